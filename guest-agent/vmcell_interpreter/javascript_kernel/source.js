// Code as V8's REPL mode takes it: imports become awaited calls, TypeScript loses its types.
'use strict';

const acorn = require('acorn');

const IMPORT = "globalThis[Symbol.for('vmcell.import')]";
let typescript;

// The JavaScript of a cell of TypeScript; throws SyntaxError with the compiler's words.
function compiled(code) {
  typescript ??= require('typescript');
  const { outputText, diagnostics } = typescript.transpileModule(code, {
    reportDiagnostics: true,
    compilerOptions: {
      target: typescript.ScriptTarget.ES2022,
      module: typescript.ModuleKind.ESNext,
      // an import that only a later cell uses has to stay
      importsNotUsedAsValues: typescript.ImportsNotUsedAsValues.Preserve,
      preserveValueImports: true,
      isolatedModules: true,
    },
  });
  if (diagnostics.length) {
    const words = diagnostics.map((found) =>
      typescript.flattenDiagnosticMessageText(found.messageText, '\n'));
    throw new SyntaxError(words.join('\n'));
  }
  return outputText.replace(/^export \{\};?\s*$/m, '');
}

function named(node) {
  return node.type === 'Identifier' ? node.name : JSON.stringify(node.value);
}

function importStatement(node) {
  const call = `await ${IMPORT}(${JSON.stringify(node.source.value)})`;
  const parts = [];
  let whole = null;
  for (const one of node.specifiers) {
    if (one.type === 'ImportNamespaceSpecifier') whole = one.local.name;
    else if (one.type === 'ImportDefaultSpecifier') parts.push(`default: ${one.local.name}`);
    else parts.push(`${named(one.imported)}: ${one.local.name}`);
  }
  if (whole !== null) {
    const rest = parts.length ? ` const { ${parts.join(', ')} } = ${whole};` : '';
    return `const ${whole} = ${call};${rest}`;
  }
  return parts.length ? `const { ${parts.join(', ')} } = ${call};` : `${call};`;
}

function* nodes(node) {
  if (Array.isArray(node)) {
    for (const one of node) yield* nodes(one);
  } else if (node && typeof node.type === 'string') {
    yield node;
    for (const key of Object.keys(node)) if (key !== 'type') yield* nodes(node[key]);
  }
}

// V8 gives evaluated code neither import statements nor import().
function withoutImports(code) {
  if (!/\bimport\b/.test(code)) return code;
  let tree;
  try {
    tree = acorn.parse(code, {
      ecmaVersion: 'latest',
      sourceType: 'module',
      allowAwaitOutsideFunction: true,
      allowHashBang: true,
    });
  } catch {
    return code; // V8's own words about it are better
  }
  const edits = [];
  for (const node of nodes(tree)) {
    if (node.type === 'ImportDeclaration') {
      edits.push([node.start, node.end, importStatement(node)]);
    } else if (node.type === 'ImportExpression') {
      edits.push([node.start, node.start + 'import'.length, IMPORT]);
    }
  }
  edits.sort((one, other) => other[0] - one[0]);
  return edits.reduce((text, [start, stop, words]) => text.slice(0, start) + words + text.slice(stop), code);
}

exports.prepared = (code, isTypescript) => withoutImports(isTypescript ? compiled(code) : code);
