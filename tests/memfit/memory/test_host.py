"""What this machine and its container allow."""

from pathlib import Path

import pytest

from memfit.errors import DoesNotFitError
from memfit.memory import host
from memfit.memory.host import Memory

GIB = 2**30


def cgroups(tmp_path: Path, lines: str, files: dict[str, str]) -> tuple[int, int]:
    own = tmp_path / "own"
    own.write_text(lines, encoding="utf-8")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return host.cgroup_memory(tmp_path / "root", own)


def test_v2_takes_the_tightest_limit_from_the_group_up_to_the_root(tmp_path):
    found = cgroups(
        tmp_path,
        "0::/user/job\n",
        {
            "user/job/memory.max": "max\n",
            "user/job/memory.current": "100\n",
            "user/memory.max": "3000\n",
            "user/memory.current": "1200\n",
            "memory.max": "9000\n",
            "memory.current": "1500\n",
        },
    )
    assert found == (3000, 1200)


def test_v1_reads_the_memory_controllers_own_tree(tmp_path):
    found = cgroups(
        tmp_path,
        "5:cpu,cpuacct:/other\n4:memory:/job\n0::/ignored\n",
        {
            "memory/job/memory.limit_in_bytes": "4000\n",
            "memory/job/memory.usage_in_bytes": "1000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "77\n",
            "memory/other/memory.limit_in_bytes": "1\n",
            "memory/other/memory.usage_in_bytes": "1\n",
        },
    )
    assert found == (4000, 1000)


def test_a_container_sees_its_own_group_at_the_mount_root(tmp_path):
    files = {"memory/memory.limit_in_bytes": "5000\n", "memory/memory.usage_in_bytes": "600\n"}
    assert cgroups(tmp_path, "4:memory:/docker/0123abc\n", files) == (5000, 600)


@pytest.mark.parametrize("key", ["inactive_file", "total_inactive_file"])
def test_file_cache_does_not_count_as_used(tmp_path, key):
    files = {"memory.max": "5000\n", "memory.current": "4500\n", "memory.stat": f"anon 500\n{key} 3900\nshmem 0\n"}
    assert cgroups(tmp_path, "0::/\n", files) == (5000, 600)


def test_a_group_above_may_have_less_left_than_the_tightest(tmp_path):
    files = {
        "pod/job/memory.max": "3000\n",
        "pod/job/memory.current": "1200\n",
        "pod/memory.max": "4000\n",
        "pod/memory.current": "3900\n",  # another group of the pod holds 2700
        "pod/memory.stat": "inactive_file 50\n",
    }
    limit, used = cgroups(tmp_path, "0::/pod/job\n", files)
    assert (limit, limit - used) == (3000, 150)


def test_a_full_group_has_nothing_left(tmp_path):
    assert cgroups(tmp_path, "0::/\n", {"memory.max": "3000\n", "memory.current": "3100\n"}) == (3000, 3000)


def test_a_group_that_slows_down_beyond_a_limit_has_no_more(tmp_path):
    files = {"memory.max": "max\n", "memory.high": "2000\n", "memory.current": "500\n"}
    assert cgroups(tmp_path, "0::/\n", files) == (2000, 500)


HYBRID = "9:name=systemd:/job\n4:memory:/job\n0::/job\n"


@pytest.mark.parametrize("tree", ["memory", "unified"])
def test_where_both_versions_are_mounted_the_one_with_the_limit_counts(tmp_path, tree):
    names = {"memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"), "unified": ("memory.max", "memory.current")}
    limit, used = names[tree]
    files = {f"{tree}/job/{limit}": "7000\n", f"{tree}/job/{used}": "900\n"}
    assert cgroups(tmp_path, HYBRID, files) == (7000, 900)


def test_swap_does_not_count(tmp_path):
    files = {
        "memory.max": "5000\n",
        "memory.current": "600\n",
        "memory.swap.max": "9000\n",
        "memory.swap.current": "800\n",
        "memory/memory.memsw.limit_in_bytes": "100\n",
        "memory/memory.memsw.usage_in_bytes": "50\n",
    }
    assert cgroups(tmp_path, "0::/\n", files) == (5000, 600)


def test_a_kernel_without_groups_has_no_limit(tmp_path):
    assert host.cgroup_memory(tmp_path, tmp_path / "absent") == (host.NO_LIMIT, 0)


@pytest.mark.parametrize(("prefetched", "pinned"), [(0, 0), (1, 0), (0, 1)])
def test_a_global_batch_must_find_room_on_the_host(monkeypatch, prefetched, pinned):
    monkeypatch.setattr(host, "host_memory", lambda: Memory(8 * GIB, 3 * GIB))
    host.check_host_memory(3 * GIB // (1 + prefetched + pinned), what="x", prefetched=prefetched, pinned=pinned)
    too_much = (3 * GIB + 2**20) // (1 + prefetched + pinned)
    with pytest.raises(DoesNotFitError, match=r"train: expected .* 3073 MiB in all; got 3072 MiB free of 8192 MiB\. "):
        host.check_host_memory(too_much, what="train", prefetched=prefetched, pinned=pinned)


def test_no_limit_is_none(tmp_path):
    limit, used = cgroups(tmp_path, "0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})
    assert limit >= host.NO_LIMIT
    assert used == 0


def test_a_process_has_no_more_than_its_container_allows(monkeypatch):
    monkeypatch.setattr(host, "machine_memory", lambda: Memory(64 * GIB, 40 * GIB))
    monkeypatch.setattr(host, "cgroup_memory", lambda: (8 * GIB, 3 * GIB))
    assert host.host_memory() == Memory(8 * GIB, 5 * GIB)


def test_without_a_limit_the_machines_free_memory_counts(monkeypatch):
    monkeypatch.setattr(host, "machine_memory", lambda: Memory(64 * GIB, 40 * GIB))
    monkeypatch.setattr(host, "cgroup_memory", lambda: (host.NO_LIMIT, 0))
    assert host.host_memory() == Memory(64 * GIB, 40 * GIB)


def test_measures_this_machine():
    memory = host.host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes <= host.machine_memory().total_bytes
    assert host.num_cores() >= 1
    assert host.processor_title()


def test_a_kernel_that_names_no_processor_gives_the_architecture(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert host.processor_title(cpuinfo).endswith("CPU")
    cpuinfo.write_text("processor : 0\nBogoMIPS : 50.00\n", encoding="utf-8")
    assert host.processor_title(cpuinfo).endswith("CPU")
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast: 9000\n", encoding="utf-8")
    assert host.processor_title(cpuinfo) == "Fast: 9000"
