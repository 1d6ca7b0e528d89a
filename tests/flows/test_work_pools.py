"""What is installed of the work pools, on a real API, and what is left alone."""

import pytest
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

from flows.work_pools import HANDED_ON, POOLS, install_pools, read_template
from memfit.errors import ConfigError


@pytest.fixture
def api(client, monkeypatch):
    """The session's API, without memfit's pools before and after."""
    for name in HANDED_ON:
        monkeypatch.delenv(name, raising=False)

    def clear() -> None:
        for pool in client.read_work_pools():
            if pool.name in POOLS:
                client.delete_work_pool(pool.name)

    clear()
    yield client
    clear()


def test_pools_are_made_once(api):
    names = [f"work pool {name}" for name in POOLS]
    assert install_pools(api, []) == dict.fromkeys(names, "created")
    assert install_pools(api, []) == dict.fromkeys(names, "unchanged")
    assert {pool.name: pool.type for pool in api.read_work_pools() if pool.name in POOLS} == POOLS


def test_a_template_is_brought_up_to_date_and_the_pool_s_own_settings_stay(api):
    install_pools(api, [])
    api.update_work_pool("memfit-docker", WorkPoolUpdate(concurrency_limit=3, is_paused=True))
    done = install_pools(api, ["memfit"])
    assert [name for name, what in done.items() if what != "unchanged"] == ["work pool memfit-docker"]
    pool = api.read_work_pool("memfit-docker")
    assert pool.base_job_template == read_template("docker", ["memfit"])
    assert (pool.concurrency_limit, pool.is_paused) == (3, True)


def test_containers_get_what_a_worker_does_not_hand_on(api, monkeypatch):
    monkeypatch.setenv("MEMFIT_MACHINE", "attic")
    monkeypatch.setenv("MEMFIT_LOG_FORMAT", "json")
    monkeypatch.setenv("MEMFIT_RUNS", "/elsewhere")
    install_pools(api, [])
    default = api.read_work_pool("memfit-docker").base_job_template["variables"]["properties"]["env"]["default"]
    assert default == {"PREFECT_HOME": "/data/prefect", "MEMFIT_MACHINE": "attic", "MEMFIT_LOG_FORMAT": "json"}


def test_a_process_pool_that_somebody_changed_is_left_alone(api):
    template = read_template("process")
    template["variables"]["properties"]["working_dir"]["default"] = "/srv"
    api.create_work_pool(WorkPoolCreate(name="memfit-process", type="process", base_job_template=template))
    assert install_pools(api, [])["work pool memfit-process"] == "unchanged"
    assert api.read_work_pool("memfit-process").base_job_template == template


def test_a_pool_of_another_type_is_refused(api):
    api.create_work_pool(
        WorkPoolCreate(name="memfit-docker", type="process", base_job_template=read_template("process"))
    )
    with pytest.raises(ConfigError, match="'memfit-docker': expected type 'docker', got 'process'"):
        install_pools(api, [])
