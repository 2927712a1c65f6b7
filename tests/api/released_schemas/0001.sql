-- The store as version 0.1.0 made it, with rows; in words that SQLite and PostgreSQL both take.
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));
CREATE TABLE teams (id VARCHAR(36) NOT NULL, name VARCHAR(64) NOT NULL, sandbox_limit INTEGER NOT NULL, created_at_unix_ms BIGINT NOT NULL, PRIMARY KEY (id), UNIQUE (name));
CREATE TABLE api_keys (hash VARCHAR(64) NOT NULL, team_id VARCHAR(36) NOT NULL, created_at_unix_ms BIGINT NOT NULL, PRIMARY KEY (hash), FOREIGN KEY(team_id) REFERENCES teams (id));
CREATE INDEX ix_api_keys_team_id ON api_keys (team_id);
CREATE TABLE templates (name VARCHAR(64) NOT NULL, image VARCHAR(512) NOT NULL, vcpus INTEGER NOT NULL, memory_mib INTEGER NOT NULL, PRIMARY KEY (name));
CREATE TABLE sandboxes (id VARCHAR(20) NOT NULL, team_id VARCHAR(36) NOT NULL, template_id VARCHAR(512) NOT NULL, access_token VARCHAR(64) NOT NULL, user_metadata JSON NOT NULL, built BOOLEAN NOT NULL, created_at_unix_ms BIGINT NOT NULL, PRIMARY KEY (id), FOREIGN KEY(team_id) REFERENCES teams (id));
CREATE INDEX ix_sandboxes_team_id ON sandboxes (team_id);
INSERT INTO alembic_version (version_num) VALUES ('0001');
INSERT INTO teams (id, name, sandbox_limit, created_at_unix_ms) VALUES ('0b5e0a3e-0000-4000-8000-000000000001', 'one', 100, 1764000000000);
INSERT INTO teams (id, name, sandbox_limit, created_at_unix_ms) VALUES ('0b5e0a3e-0000-4000-8000-000000000002', 'two', 7, 1764000000001);
INSERT INTO api_keys (hash, team_id, created_at_unix_ms) VALUES ('1d6f5a0c5b8f2f1f0000000000000000000000000000000000000000000000a1', '0b5e0a3e-0000-4000-8000-000000000001', 1764000000002);
INSERT INTO api_keys (hash, team_id, created_at_unix_ms) VALUES ('1d6f5a0c5b8f2f1f0000000000000000000000000000000000000000000000a2', '0b5e0a3e-0000-4000-8000-000000000001', 1764000000003);
INSERT INTO api_keys (hash, team_id, created_at_unix_ms) VALUES ('1d6f5a0c5b8f2f1f0000000000000000000000000000000000000000000000a3', '0b5e0a3e-0000-4000-8000-000000000002', 1764000000004);
INSERT INTO templates (name, image, vcpus, memory_mib) VALUES ('base', 'docker.io/vmcell/base:latest', 1, 512);
INSERT INTO templates (name, image, vcpus, memory_mib) VALUES ('small', 'docker.io/vmcell/small:latest', 1, 256);
INSERT INTO templates (name, image, vcpus, memory_mib) VALUES ('mine', 'docker.io/x/y:1', 2, 1024);
INSERT INTO sandboxes (id, team_id, template_id, access_token, user_metadata, built, created_at_unix_ms) VALUES ('i0000000000000000001', '0b5e0a3e-0000-4000-8000-000000000001', 'base', 'token-of-one', '{"who": "me & you", "é": "ü"}', true, 1764000000005);
INSERT INTO sandboxes (id, team_id, template_id, access_token, user_metadata, built, created_at_unix_ms) VALUES ('i0000000000000000002', '0b5e0a3e-0000-4000-8000-000000000002', 'docker.io/x/y:1', '', '{}', false, 1764000000006);
