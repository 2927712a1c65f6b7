"""The unmodified E2B SDK's template calls against the API with a fake builder, over loopback."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, listening
from e2b import Sandbox, Template
from e2b.exceptions import BuildException, FileUploadException, SandboxException, TemplateException


@pytest.fixture
def sdk(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with listening(service.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        yield service


def test_build_with_files_then_a_sandbox_of_it(sdk: ApiService, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "app.py").write_bytes(b"print(1)\n" * 1000)
    template = (
        Template(file_context_path=context)
        .from_image("docker.io/vmcell/small:latest")
        .copy("app.py", "/app/", mode=0o600)
        .run_cmd("make", user="root")
        .set_envs({"A": "b"})
        .set_workdir("/app")
        .set_user("user")
        .set_start_cmd("serve", "test -f /ready")
    )
    lines: list[str] = []
    info = Template.build(
        template,
        "Shop:v1",
        tags=["stable"],
        cpu_count=2,
        memory_mb=1024,
        on_build_logs=lambda entry: lines.append(entry.message),
    )
    assert info.tags == ["v1", "stable"]
    assert any("RUN make root" in line for line in lines)
    (order,) = sdk.builder.orders
    assert [step.type for step in order.steps] == ["COPY", "RUN", "ENV", "WORKDIR", "USER"]
    assert (order.vcpus, order.memory_mib) == (2, 1024)
    assert (order.start_command, order.ready_command) == ("serve", "test -f /ready")
    copy = order.steps[0]
    assert copy.args == ["app.py", "/app/", "", "0600"]
    upload = Path(sdk.config.upload_dir, order.team_id, copy.files_hash)
    with tarfile.open(upload) as tar:
        content = tar.extractfile("app.py")
        assert content is not None
        assert (
            hashlib.sha256(content.read()).digest() == hashlib.sha256(b"print(1)\n" * 1000).digest()
        )
    assert Template.exists("shop") is True
    assert Template.exists("shop:v1") is True
    assert Template.exists("none") is False

    Sandbox.create(template="shop:stable")
    made = sdk.node.orders[-1]
    assert made.image == f"vmcell.local/build/{info.build_id}"
    assert (made.default_user, made.default_workdir) == ("user", "/app")
    assert (made.start_command, made.ready_command) == ("serve", "test -f /ready")
    assert (made.vcpus, made.memory_mib) == (2, 1024)
    assert made.template_id == info.template_id

    Template.build(template, "shop", on_build_logs=lambda entry: lines.append(entry.message))
    assert "Skipping upload of 'app.py', already cached" in lines


def test_a_failing_step_points_at_the_callers_line(sdk: ApiService) -> None:
    template = Template().from_image("small").run_cmd("true").run_cmd("exit 3")
    with pytest.raises(BuildException, match="it went wrong") as caught:
        Template.build(template, "broken")
    trace = caught.value.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    assert trace.tb_frame.f_code.co_filename == __file__
    with pytest.raises(SandboxException, match="broken"):
        Sandbox.create(template="broken")


def test_in_the_background_with_status_and_paged_log(sdk: ApiService) -> None:
    template = Template().from_image("small")
    for number in range(150):
        template = template.run_cmd(f"echo {number}")
    sdk.builder.hold = True
    info = Template.build_in_background(template, "slow")
    first = Template.get_build_status(info)
    assert first.status.value == "building"
    assert len(first.log_entries) == 100
    with pytest.raises(SandboxException):
        Sandbox.create(template="slow")
    sdk.builder.hold = False
    rest = Template.get_build_status(info, logs_offset=100)
    assert rest.status.value == "ready"
    assert [entry.message for entry in rest.log_entries][-1] == "RUN echo 149"
    assert Template.get_build_status(info, logs_offset=151).log_entries == []
    Sandbox.create(template="slow")


def test_tags_stand_for_builds(sdk: ApiService) -> None:
    template = Template().from_image("small").run_cmd("true")
    first = Template.build(template, "shop:v1")
    second = Template.build(template, "shop:v2")
    assert {tag.tag: tag.build_id for tag in Template.get_tags("shop")} == {
        "v1": first.build_id,
        "v2": second.build_id,
    }
    assigned = Template.assign_tags("shop:v1", ["stable", "old"])
    assert assigned.build_id == first.build_id
    moved = Template.assign_tags("team-one/shop:v2", ["stable"])
    assert (moved.build_id, moved.tags) == (second.build_id, ["stable"])
    Template.remove_tags("shop", ["old"])
    assert {tag.tag: tag.build_id for tag in Template.get_tags("team-one/shop")} == {
        "v1": first.build_id,
        "v2": second.build_id,
        "stable": second.build_id,
    }
    Sandbox.create(template="team-one/shop:v1")
    assert sdk.node.orders[-1].image.endswith(first.build_id)
    with pytest.raises(TemplateException, match="no tag"):
        Template.remove_tags("shop", ["old"])
    with pytest.raises(TemplateException, match="nosuch"):
        Template.assign_tags("nosuch:v1", ["x"])
    with pytest.raises(TemplateException, match="no tag"):
        Template.assign_tags("shop:v1", ["no good"])


def test_templates_are_a_teams_own(sdk: ApiService) -> None:
    template = Template().from_image("small").run_cmd("true")
    Template.build(template, "shop")
    other = sdk.new_key("other team")
    assert Template.exists("shop", api_key=other) is False
    assert Template.exists("team-one/shop", api_key=other) is True, "403 means: somebody else's"
    with pytest.raises(SandboxException):
        Sandbox.create(template="team-one/shop", api_key=other)
    with pytest.raises(BuildException, match="namespace"):
        Template.build(template, "team-one/shop", api_key=other)
    mine = Template.build(template, "shop", api_key=other)
    assert Template.exists("other-team/shop") is True
    Sandbox.create(template="other-team/shop", api_key=other)
    assert sdk.node.orders[-1].image.endswith(mine.build_id)


def test_an_upload_over_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api_service import api_service

    context = tmp_path / "context"
    context.mkdir()
    (context / "big").write_bytes(bytes(2 << 20))
    with (
        api_service(tmp_path, max_upload_mib=1) as service,
        listening(service.app) as address,
    ):
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        template = Template(file_context_path=context).from_image("small")
        with pytest.raises(FileUploadException, match=r"413|upload"):
            Template.build(template.copy("big", "/", gzip=False), "big")
        left = [path for path in Path(service.config.upload_dir).rglob("*") if path.is_file()]
        assert left == []
        assert service.builder.orders == []
