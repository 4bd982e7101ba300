"""cluster.yaml, checked as `ray up` checks it: no cloud, no network.

Ray's check does not look into node_config, so instance types and images are not covered.
"""

import tune_steel.ray_environment  # noqa: F401

import copy
import os
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


def written():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def prepared(config):
    """The config with Ray's defaults filled in, after Ray's own check."""
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def test_cluster_yaml_is_valid_by_rays_own_schema():
    prepared(written())


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda c: c.update(worker_count=3), "worker_count"),
        (lambda c: c.update(max_workers="8"), "not of type 'integer'"),
        (lambda c: c.update(head_node_type="no such type"), "head_node_type"),
        (lambda c: c["available_node_types"]["cpu_worker"].update(spot=True), "spot"),
        (lambda c: c["available_node_types"]["cpu_worker"].pop("resources"), "resources"),
        (lambda c: c["available_node_types"]["cpu_worker"].update(min_workers=9), "min_workers"),
    ],
)
def test_a_broken_copy_is_rejected_by_the_same_check(broken, says):
    config = written()
    broken(config)
    with pytest.raises((ValidationError, ValueError), match=says):
        prepared(config)


def test_workers_are_spot_instances_that_scale_from_none_and_the_head_is_on_demand():
    config = prepared(written())
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types
    for worker in types.values():
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]


def test_no_trial_runs_on_the_head():
    config = written()
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])


def test_the_checkout_is_copied_without_its_environment_its_results_and_its_history():
    config = written()
    assert config["file_mounts"] == {"~/tune_steel": "."}
    assert {"/.git", "/.venv", "/results"} <= set(config["rsync_exclude"])


@pytest.mark.parametrize("node", ["head", "worker"])
def test_the_project_is_installed_on_every_node_with_the_tested_versions(node):
    config = prepared(written())
    installs = [c for c in config[f"{node}_setup_commands"] if "pip install" in c]
    assert len(installs) == 1
    assert installs[0].startswith("cd ~/tune_steel && ~/venv/bin/pip install ")
    assert "-c constraints.txt" in installs[0]
    assert installs[0].endswith("'.[cluster]'")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "cluster" in project["optional-dependencies"]


@pytest.mark.parametrize("node", ["head", "worker"])
def test_wherever_ray_starts_its_auth_mode_is_said(node):
    config = prepared(written())
    starts = [c for c in config[f"{node}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token ray start " in starts[0]


def test_the_head_makes_the_token_and_the_workers_get_it():
    config = prepared(written())
    assert any("ray get-auth-token --generate" in c for c in config["head_setup_commands"])
    assert not any("get-auth-token" in c for c in config["worker_setup_commands"])
    assert config["cluster_synced_files"] == ["~/.ray/auth_token"]


def test_workers_get_the_settings_that_those_of_a_private_ray_have():
    (start,) = [c for c in written()["worker_start_ray_commands"] if "ray start" in c]
    names = {n for n in os.environ if n.startswith("MALLOC_")}
    names |= {"GLIBC_TUNABLES", "RAY_memory_monitor_refresh_ms"}
    assert len(names) == 5
    for name in names:
        assert f" {name}={os.environ[name]} " in start
