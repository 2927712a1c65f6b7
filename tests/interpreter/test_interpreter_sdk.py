"""The unmodified `e2b_code_interpreter` against the server and real kernels."""

from __future__ import annotations

import base64
import threading
import time

import pytest
from e2b.exceptions import (
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)
from e2b_code_interpreter import Execution, Sandbox
from e2b_code_interpreter.charts import BarChart, LineChart, PieChart, SuperChart
from interpreter_harness import Interpreter

PNG = b"\x89PNG\r\n\x1a\n"


def good(execution: Execution) -> Execution:
    assert execution.error is None, execution.error
    return execution


def test_state_output_and_results(sandbox: Sandbox) -> None:
    heard: list[str] = []
    first = good(sandbox.run_code("a = 40"))
    second = good(
        sandbox.run_code(
            "import sys; print('out'); print('err', file=sys.stderr); a + 2",
            on_stdout=lambda message: heard.append(message.line),
        )
    )
    assert second.text == "42"
    assert heard == ["out\n"]
    assert second.logs.stderr == ["err\n"]
    assert second.execution_count == (first.execution_count or 0) + 1
    assert good(sandbox.run_code("'quoted'")).text == "quoted"
    assert good(sandbox.run_code("{'a': [1, None]}")).results[0].json == {"a": [1, None]}
    assert good(sandbox.run_code("print('\u2028é')")).logs.stdout == ["\u2028é\n"]


def test_an_exception_is_told_with_its_traceback(sandbox: Sandbox) -> None:
    error = sandbox.run_code("def f():\n    1/0\nf()").error
    assert error is not None
    assert (error.name, error.value) == ("ZeroDivisionError", "division by zero")
    assert "line 2" in error.traceback
    syntax = sandbox.run_code("for").error
    assert syntax is not None
    assert syntax.name == "SyntaxError"
    asked = sandbox.run_code("input()").error
    assert asked is not None
    assert asked.name == "StdinNotImplementedError"


DRAW = "import matplotlib.pyplot as plt\n"


def test_a_plot_is_a_picture_and_a_chart(sandbox: Sandbox) -> None:
    code = DRAW + "plt.plot([1, 2], [3, 4], label='l'); plt.xlabel('t (s)'); plt.show()"
    (shown,) = good(sandbox.run_code(code)).results
    assert shown.png is not None
    assert base64.b64decode(shown.png).startswith(PNG)
    assert not shown.is_main_result
    chart = shown.chart
    assert isinstance(chart, LineChart)
    assert (chart.x_label, chart.x_unit, chart.x_scale) == ("t (s)", "s", "linear")
    assert [(line.label, line.points) for line in chart.elements] == [("l", [(1, 3), (2, 4)])]


def test_bars_pies_and_several_charts_at_once(sandbox: Sandbox) -> None:
    code = DRAW + (
        "figure, (one, two) = plt.subplots(1, 2)\n"
        "one.bar(['p', 'q'], [1, 2], label='g'); two.pie([1, 3], labels=['x', 'y'])\n"
        "figure.suptitle('both'); plt.show()"
    )
    chart = good(sandbox.run_code(code)).results[0].chart
    assert isinstance(chart, SuperChart)
    bars, pie = chart.elements
    assert isinstance(bars, BarChart)
    assert [(bar.label, bar.group, bar.value) for bar in bars.elements] == [
        ("p", "g", 1),
        ("q", "g", 2),
    ]
    assert isinstance(pie, PieChart)
    assert [(slice_.label, slice_.angle) for slice_ in pie.elements] == [("x", 90), ("y", 270)]


SCATTER = "plt.scatter(['a', 'b'], [3, 4]); plt.yscale('log')"
DATES = "import pandas as pd; pd.Series([1, 2], pd.date_range('2020', periods=2, freq='D')).plot()"
BOXES = "plt.boxplot([[1, 2, 3, 4, 100]], tick_labels=['b'], showmeans=True)"
LYING = "plt.boxplot([[1, 2, 3, 4, 100]], orientation='horizontal', patch_artist=True)"
BOX = {"min": 1, "first_quartile": 2, "median": 3, "third_quartile": 4, "max": 4, "outliers": [100]}


@pytest.mark.parametrize(
    ("code", "kind", "elements"),
    [
        (SCATTER, "scatter", [{"label": "Scatter 1", "points": [["a", 3], ["b", 4]]}]),
        (
            DATES,
            "line",
            [
                {
                    "label": "Line 1",
                    "points": [["2020-01-01T00:00:00", 1], ["2020-01-02T00:00:00", 2]],
                }
            ],
        ),
        (BOXES, "box_and_whisker", [{"label": "b", **BOX}]),
        (LYING, "box_and_whisker", [{"label": "1", **BOX}]),
        ("plt.plot([1, 1], [2, 3])", "line", [{"label": "Line 1", "points": [[1, 2], [1, 3]]}]),
        ("plt.barh(['u'], [float('nan')])", "bar", [{"label": "u", "group": "", "value": None}]),
        ("plt.imshow([[1, 2]]); plt.colorbar()", "unknown", []),
    ],
)
def test_charts(sandbox: Sandbox, code: str, kind: str, elements: object) -> None:
    (shown,) = good(sandbox.run_code(f"{DRAW}{code}; plt.show()")).results
    assert shown.chart is not None
    raw = shown.chart.to_dict()
    assert (raw["type"], raw["elements"]) == (kind, elements)


def test_a_data_frame_is_a_table_and_its_columns(sandbox: Sandbox) -> None:
    code = (
        "import pandas as pd, numpy as np\n"
        "pd.DataFrame({'n': [1.5, np.nan], 's': ['x', None], "
        "'t': pd.to_datetime(['2020-01-01', None]), 'i': pd.array([1, None], dtype='Int64')})"
    )
    (shown,) = good(sandbox.run_code(code)).results
    assert shown.data == {
        "n": [1.5, None],
        "s": ["x", None],
        "t": ["2020-01-01T00:00:00", None],
        "i": [1, None],
    }
    assert "<table" in (shown.html or "")
    large = good(sandbox.run_code("pd.DataFrame(np.zeros((100_001, 1)))")).results[0]
    assert large.data is None
    assert large.html


def test_pictures_and_rich_objects(sandbox: Sandbox) -> None:
    picture = good(sandbox.run_code("from PIL import Image; Image.new('RGB', (2, 2))")).results[0]
    assert base64.b64decode(picture.png or "").startswith(PNG)
    code = (
        "from IPython.display import *\n"
        "display(HTML('<b>')); display(Markdown('*m*')); display(Latex('$l$')); "
        "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')); display(JSON({'k': 1})); "
        "display({'application/x-own': 'mine'}, raw=True)"
    )
    results = good(sandbox.run_code(code)).results
    html, markdown, latex, svg, json, own = results
    assert (html.html, markdown.markdown, latex.latex) == ("<b>", "*m*", "$l$")
    assert (svg.svg or "").startswith("<svg")
    assert json.json == {"k": 1}
    assert own.extra == {"application/x-own": "mine"}


@pytest.mark.parametrize(
    ("language", "read", "unset"),
    [
        ("python", "import os; print(repr(os.environ.get('ONE')), os.environ['TWO'])", "None"),
        ("javascript", "console.log(process.env.ONE, process.env.TWO)", "undefined"),
        ("bash", 'echo "${ONE-none}" "$TWO"', "none"),
    ],
)
def test_variables_of_one_run(sandbox: Sandbox, language: str, read: str, unset: str) -> None:
    context = sandbox.create_code_context(language=language)
    run = {"context": context}
    setting = {
        "python": "import os; os.environ['TWO'] = 'kept'",
        "javascript": "process.env.TWO = 'kept'",
        "bash": "export TWO=kept",
    }
    good(sandbox.run_code(setting[language], **run))
    given = {"ONE": "é 'quoted' $x", "TWO": "other"}
    during = "".join(good(sandbox.run_code(read, envs=given, **run)).logs.stdout)
    assert "é" in during
    assert "quoted" in during
    assert "$x" in during
    assert "other" in during
    after = "".join(good(sandbox.run_code(read, **run)).logs.stdout)
    assert after.split() == [unset, "kept"]
    sandbox.remove_code_context(context)


def test_contexts(sandbox: Sandbox, interpreter: Interpreter) -> None:
    languages = {context.language for context in sandbox.list_code_contexts()}
    assert {"python", "javascript"} <= languages
    made = sandbox.create_code_context(cwd="/tmp", language="python")
    assert (made.cwd, made.language) == ("/tmp", "python")
    good(sandbox.run_code("kept = 1", context=made))
    assert (
        good(sandbox.run_code("import os; kept, os.getcwd()", context=made)).text == "(1, '/tmp')"
    )
    apart = sandbox.run_code("kept").error
    assert apart is not None
    assert apart.name == "NameError"
    sandbox.restart_code_context(made)
    lost = sandbox.run_code("kept", context=made).error
    assert lost is not None
    assert lost.name == "NameError"
    sandbox.remove_code_context(made)
    assert made.id not in {context.id for context in sandbox.list_code_contexts()}
    with pytest.raises(NotFoundException):
        sandbox.run_code("1", context=made)
    with pytest.raises(NotFoundException):
        sandbox.remove_code_context(made)
    default = good(sandbox.run_code("import os; os.getcwd()")).text
    assert default == str(interpreter.cwd)


def test_what_cannot_be_had_is_refused_by_name(sandbox: Sandbox) -> None:
    for language, words in (("r", "R is not installed"), ("java", "Java is"), ("no", "No kernel")):
        with pytest.raises(SandboxException, match=words):
            sandbox.run_code("1", language=language)
        with pytest.raises(SandboxException, match=words):
            sandbox.create_code_context(language=language)
    with pytest.raises(SandboxException, match="/nosuch' does not exist"):
        sandbox.create_code_context(cwd="/nosuch")
    context = sandbox.create_code_context()
    with pytest.raises(InvalidArgumentException):
        sandbox.run_code("1", language="python", context=context)
    sandbox.remove_code_context(context)


def test_javascript(sandbox: Sandbox) -> None:
    code = (
        "import { basename } from 'node:path'\n"
        "const answer = await Promise.resolve(basename('/a/b'))\n"
        "console.log('one'); console.error('two'); ({ answer })"
    )
    for _ in range(2):  # const may be declared again
        execution = good(sandbox.run_code(code, language="js"))
        assert execution.text == "{ answer: 'b' }"
        assert execution.results[0].json == {"answer": "b"}
        assert (execution.logs.stdout, execution.logs.stderr) == (["one\n"], ["two\n"])
    error = sandbox.run_code("function f() { throw new TypeError('no') }\nf()", language="js").error
    assert error is not None
    assert (error.name, error.value) == ("TypeError", "no")
    assert "at f" in error.traceback
    assert "driver" not in error.traceback
    child = sandbox.run_code(
        "require('child_process').spawnSync('echo', ['x'], {stdio: 'inherit'}).status",
        language="js",
    )
    assert (good(child).text, child.logs.stdout) == ("0", ["x\n"])


def test_typescript(sandbox: Sandbox) -> None:
    code = "interface P { x: number }\nconst p: P = { x: 3 }\np.x as number"
    assert good(sandbox.run_code(code, language="ts")).text == "3"
    broken = sandbox.run_code("const p: =", language="typescript").error
    assert broken is not None
    assert broken.name == "SyntaxError"


def test_bash(sandbox: Sandbox) -> None:
    good(sandbox.run_code("cd /; X=5", language="bash"))
    execution = sandbox.run_code('for i in 1 2; do\n  echo "$X $i"\ndone\npwd', language="bash")
    assert "".join(good(execution).logs.stdout) == "5 1\n5 2\n/\n"
    failed = sandbox.run_code("false", language="bash").error
    assert failed is not None
    assert failed.value == "1"


SLEEPS = {
    "python": ("import time; mark = 1", "time.sleep(120)", "mark"),
    "javascript": ("mark = 1", "for (;;) {}", "mark"),
    "bash": ("mark=1", "sleep 120", "echo $mark"),
}


@pytest.mark.parametrize("language", SLEEPS)
def test_a_client_that_leaves_interrupts_its_run(sandbox: Sandbox, language: str) -> None:
    before, long, after = SLEEPS[language]
    context = sandbox.create_code_context(language=language)
    good(sandbox.run_code(before, context=context))
    with pytest.raises(TimeoutException):
        sandbox.run_code(long, context=context, timeout=1)
    execution = good(sandbox.run_code(after, context=context, timeout=30))
    assert (execution.text or "".join(execution.logs.stdout)).strip() == "1"
    sandbox.remove_code_context(context)


def test_runs_of_one_context_wait_and_others_do_not(sandbox: Sandbox) -> None:
    other = sandbox.create_code_context()
    code = "import time; begun = time.monotonic(); time.sleep(1); begun, time.monotonic()"
    spans: list[tuple[float, float]] = []

    def run(**where: object) -> None:
        begun, ended = (good(sandbox.run_code(code, **where)).text or "").strip("()").split(",")
        spans.append((float(begun), float(ended)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads.append(threading.Thread(target=run, kwargs={"context": other}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(spans) == 3
    overlaps = sum(
        one < other_span and one[0] < other_span[1] and other_span[0] < one[1]
        for one in spans
        for other_span in spans
    )
    # the other context's run beside one or both of the two, which are never beside each other
    assert 1 <= overlaps <= 2
    sandbox.remove_code_context(other)


def test_a_restart_ends_the_run(sandbox: Sandbox) -> None:
    context = sandbox.create_code_context()
    ended: list[Execution] = []
    begun = threading.Event()
    thread = threading.Thread(
        target=lambda: ended.append(
            sandbox.run_code(
                "import time; print('on', flush=True); time.sleep(120)",
                context=context,
                on_stdout=lambda message: begun.set(),
            )
        )
    )
    thread.start()
    assert begun.wait(30)
    sandbox.restart_code_context(context)
    thread.join(30)
    assert ended[0].error is not None
    assert ended[0].error.name == "ContextRestarting"
    assert good(sandbox.run_code("1 + 1", context=context)).text == "2"
    sandbox.remove_code_context(context)


@pytest.mark.parametrize(
    ("language", "deadly", "harmless"),
    [
        ("python", "import os; os.kill(os.getpid(), 9)", "1"),
        ("javascript", "process.exit(3)", "1"),
        ("bash", "kill -9 $PPID", "echo 1"),
    ],
)
def test_a_kernel_that_dies_is_started_again(
    sandbox: Sandbox, interpreter: Interpreter, language: str, deadly: str, harmless: str
) -> None:
    context = sandbox.create_code_context(language=language)
    error = sandbox.run_code(deadly, context=context).error
    assert error is not None
    assert error.name == "ContextRestarting"
    assert "died" in error.value
    good(sandbox.run_code(harmless, context=context))
    assert not interpreter.zombies()
    sandbox.remove_code_context(context)


def test_much_output_arrives_whole_and_in_order(sandbox: Sandbox) -> None:
    count = 5_000
    code = f"for i in range({count}): display({{'text/plain': str(i)}}, raw=True)"
    started = time.monotonic()
    results = good(sandbox.run_code(code, timeout=100)).results
    assert [result.text for result in results] == [str(number) for number in range(count)]
    assert time.monotonic() - started < 100
    lines = good(sandbox.run_code(f"seq {count}", language="bash", timeout=100)).logs.stdout
    assert "".join(lines) == "".join(f"{number + 1}\n" for number in range(count))
    text = good(sandbox.run_code("print('x' * 10_000_000)")).logs.stdout
    assert "".join(text) == "x" * 10_000_000 + "\n"
