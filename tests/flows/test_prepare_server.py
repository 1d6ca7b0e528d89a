"""`python -m flows.prepare_server`: what it installs, how often, and what it says of the server."""

import sys
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import plan_memory, prepare_server, train_model
from flows.prepare_server import (
    AUTOMATION,
    CRASH_AFTER_SECONDS,
    FLOWS,
    HEARTBEAT_SECONDS,
    heartbeat_automation,
    install,
    lease_warning,
)
from memfit.errors import ConfigError


@pytest.fixture
def says(monkeypatch, capsys):
    """Run the command in this process; return exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_server", *arguments])
        with pytest.raises(SystemExit) as left:
            prepare_server.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def test_help_says_what_is_installed(says):
    code, out, _ = says("--help")
    assert code == 0
    assert all(word in out for word in ("--device", "--crash-after", "heartbeat", "MEMFIT_MACHINE"))


def test_without_a_server_it_says_what_to_set(says):
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        code, out, err = says()
    assert (code, out) == (2, "")
    assert "PREFECT_API_URL" in err


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, ConfigError, r"status 401.*PREFECT_API_AUTH_STRING"), (500, httpx.HTTPStatusError, "500")],
)
def test_only_a_server_that_does_not_let_it_in_is_answered_with_what_to_set(status, error, message):
    answer = httpx.Response(status, request=httpx.Request("GET", "http://server"))
    with (
        temporary_settings({PREFECT_API_URL: "http://server:4200/api"}),
        pytest.raises(error, match=message),
        prepare_server.connected(),
    ):
        answer.raise_for_status()


def test_runs_say_that_they_live_three_times_before_they_count_as_crashed(root):
    shipped = yaml.safe_load((Path(root) / "prefect.yaml").read_text())
    environments = [each["work_pool"]["job_variables"]["env"] for each in shipped["deployments"]]
    assert {each["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for each in environments} == {str(HEARTBEAT_SECONDS)}
    assert heartbeat_automation(CRASH_AFTER_SECONDS).trigger.within == timedelta(seconds=90)


def test_only_memfit_s_flows_are_watched():
    related = heartbeat_automation(90).trigger.match_related.model_dump()
    assert set(related["prefect.resource.name"]) == {train_model.train_model.name, plan_memory.plan_config.name}
    assert set(FLOWS) == set(related["prefect.resource.name"])


def test_what_is_there_is_brought_up_to_date(client, says):
    client.create_automation(heartbeat_automation(500))
    client.create_automation(heartbeat_automation(600))
    code, out, err = says("--device", "cuda:8", "--device", "cuda:9")
    assert code == 0, err
    assert "90 s: changed" in out
    assert says("--device", "cuda:8", "--device", "cuda:9")[1].count(": unchanged") == 3
    (automation,) = client.read_automations_by_name(AUTOMATION)
    assert automation.trigger.within == timedelta(seconds=90)
    client.update_global_concurrency_limit("memfit-cuda-9", limit_of(3))
    install(client, ["cuda:9"], 90)
    assert [client.read_global_concurrency_limit_by_name(f"memfit-cuda-{n}").limit for n in (8, 9)] == [1, 1]


def limit_of(count: int):
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    return GlobalConcurrencyLimitUpdate(limit=count)


def test_a_server_that_forgets_its_leases_is_warned_of(client, monkeypatch):
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=" in (lease_warning(client) or "")

    class Answer:
        def json(self):
            return {"server": {"concurrency": {"lease_storage": prepare_server.LEASES_ON_DISK}}}

    monkeypatch.setattr(client, "request", lambda *_arguments: Answer())
    assert lease_warning(client) is None
