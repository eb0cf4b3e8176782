"""The role's files, as far as one machine can check them: lint, syntax, and the configuration that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PermanentError
from edge_agent.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TEMPLATE = ROOT / "ansible/roles/edge_agent/templates/config.toml.j2"
DEFAULTS = ROOT / "ansible/roles/edge_agent/defaults/main.yml"
NODE = {"enterprise": "acme", "site": "ulm", "name": "gw-1"}

needs_ansible = pytest.mark.needs("module:ansible")


def render(directory: Path, **variables: Any) -> Path:
    """Render the template with Ansible itself, on top of the role's defaults."""
    target = directory / "config.toml"
    given = directory / "variables.json"
    given.write_text(json.dumps(variables))
    subprocess.run(
        [
            BIN / "ansible",
            *("localhost", "-i", "localhost,", "-c", "local"),
            *("-m", "ansible.builtin.template", "-a", f"src={TEMPLATE} dest={target} mode=0600"),
            *("-e", f"@{DEFAULTS}", "-e", f"@{given}", "-e", f"ansible_python_interpreter={sys.executable}"),
        ],
        check=True,
        capture_output=True,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C.UTF-8", "ANSIBLE_LOCAL_TEMP": str(directory), "ANSIBLE_HOME": str(directory)},
        timeout=60,
    )
    return target


def settings_of(directory: Path, **variables: Any) -> Settings:
    return load_settings(render(directory, **variables))


@needs_ansible
def test_the_least_configuration_is_one_that_the_agent_accepts(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, edge_agent_node=NODE, edge_agent_mqtt={"host": "broker"})
    assert settings.node.name == "gw-1"
    assert settings.mqtt.host == "broker"
    assert settings.mqtt.password_file is None
    assert settings.log.level == "info"


@needs_ansible
def test_every_kind_of_value_arrives_as_it_was_given(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        edge_agent_node={**NODE, "line": 'Straße "7" \\ süd'},
        edge_agent_mqtt={
            "host": "broker",
            "port": 8883,
            "tls": True,
            "username": None,
            "sources": [{"topic": "a/+/b", "task": "triage"}, {"topic": "c", "task": "other"}],
        },
        edge_agent_mqtt_password="s3cret",
        edge_agent_update={"registry_url": "https://registry.example/edge", "target": "cpu-arm64"},
        edge_agent_log_level="debug",
        edge_agent_extra_settings={
            "state_dir": "/srv/edge",
            "worker": {"threads": 2, "start_timeout_s": 12.5},
            "mqtt": {"keepalive_s": 45},
        },
    )
    assert settings.node.line == 'Straße "7" \\ süd'
    assert (settings.mqtt.port, settings.mqtt.tls, settings.mqtt.username) == (8883, True, None)
    assert [(s.topic, s.task) for s in settings.mqtt.sources] == [("a/+/b", "triage"), ("c", "other")]
    assert settings.mqtt.keepalive_s == 45
    assert settings.update.registry_url == "https://registry.example/edge"
    assert settings.update.target == "cpu-arm64"
    assert settings.log.level == "debug"
    assert settings.state_dir == Path("/srv/edge")
    assert (settings.worker.threads, settings.worker.start_timeout_s) == (2, 12.5)


@needs_ansible
def test_the_password_is_named_by_its_credential_and_never_written(tmp_path: Path) -> None:
    target = render(
        tmp_path, edge_agent_node=NODE, edge_agent_mqtt={"host": "broker"}, edge_agent_mqtt_password="s3cret"
    )
    assert "s3cret" not in target.read_text()
    settings = load_settings(target)
    assert settings.mqtt.password_file == Path("/run/credentials/edge-agent.service/edge-agent_mqtt-password")


@needs_ansible
def test_the_key_of_the_escalation_server_is_named_by_its_credential_and_never_written(tmp_path: Path) -> None:
    target = render(
        tmp_path,
        edge_agent_node=NODE,
        edge_agent_mqtt={"host": "broker"},
        edge_agent_escalation={"base_url": "https://llm.ulm.example/v1", "model": "large", "mqtt": True},
        edge_agent_escalation_api_key="sk-s3cret",
    )
    assert "sk-s3cret" not in target.read_text()
    section = load_settings(target).escalation
    assert (section.base_url, section.model, section.mqtt) == ("https://llm.ulm.example/v1", "large", True)
    assert section.api_key_file == Path("/run/credentials/edge-agent.service/edge-agent_escalation-api-key")


@needs_ansible
def test_a_setting_that_the_agent_does_not_know_is_found_by_the_validation(tmp_path: Path) -> None:
    target = render(
        tmp_path,
        edge_agent_node=NODE,
        edge_agent_mqtt={"host": "broker"},
        edge_agent_extra_settings={"spool": {"inbox_max": 5}},
    )
    with pytest.raises(PermanentError, match=r"spool\.inbox_max"):
        load_settings(target)


@needs_ansible
@pytest.mark.needs("module:ansiblelint")
@pytest.mark.timeout(180)
def test_lint_and_syntax_pass() -> None:
    done = subprocess.run(
        [ROOT / ".ci/check_ansible.sh", BIN], capture_output=True, text=True, check=False, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
