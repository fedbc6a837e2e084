"""The doctor finds what was broken on purpose, says what to set, and finds nothing on a machine that is well."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv3.parallel import probes
from dsv3.parallel.doctor import Examination, Finding, examine, judge, meet, roll_call
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
ETH = {"name": "eth0", "address": "10.0.0.1", "up": True, "loopback": False, "mbit": 100_000}
GB = 10**9
HOST_WIDE = (
    "open_files",
    "shared_memory_bytes",
    "infiniband",
    "locked_memory",
    "resolves_to",
    "environment.GLOO_SOCKET_IFNAME",
)


def healthy(ranks: int = 4, hosts: int = 2) -> list[dict[str, Any]]:
    """Facts of ranks that want nothing."""
    return [
        {
            "rank": rank, "host": f"n{rank * hosts // ranks}", "pid": rank, "resolves_to": "10.0.0.1", "route": "10.0.0.1",
            "versions": {"dsv3": "0.1.0", "sources": "ab", "python": "3.11.7", "torch": "2.13.0", "cuda": "12.8", "nccl": "2.27"},
            "environment": {"LOCAL_RANK": str(rank)}, "interfaces": [ETH], "infiniband": [], "cpus": 96, "threads": 8,
            "memory_bytes": 2000 * GB, "open_files": 65536, "locked_memory": -1, "shared_memory_bytes": 16 * GB, "gpus": 8,
            "gpu": {"name": "H800", "uuid": f"GPU-{rank}", "free_bytes": 79 * GB, "total_bytes": 80 * GB},
            "compute": 6e14, "shared": True, "disk": {"free_bytes": 9000 * GB, "write_rate": 1e9, "read_rate": 2e9},
        }
        for rank in range(ranks)
    ]  # fmt: skip


def wire(ranks: int = 4) -> dict[str, Any]:
    links = [((r - shift) % ranks, r, 20e9) for r in range(ranks) for shift in (1, 2)]
    return {"all_reduce": 1e11, "all_to_all": 1e11, "latency_s": 1e-5, "false": {}, "links": links,
            "clocks": [(0.0, 0.0)] * ranks}  # fmt: skip


def found(ranks: list[dict], network: dict | None = None, **asked: Any) -> list[Finding]:
    return judge(ranks, network or wire(len(ranks)), Examination(**asked))


def test_a_healthy_cluster_has_no_findings():
    assert found(healthy()) == []


@pytest.mark.parametrize(
    ("changes", "level", "what", "cure"),
    [
        ({"versions.torch": "2.11.0"}, "wrong", "torch: 2.13.0 on ranks 0, 1, 2; 2.11.0 on ranks 3", "same on every machine"),
        ({"versions.sources": "cd"}, "wrong", "the sources of dsv3", "same on every machine"),
        ({"environment.NCCL_ALGO": "Ring"}, "wrong", "NCCL_ALGO: none on ranks 0, 1, 2; Ring on ranks 3", "alike"),
        ({"environment.GLOO_SOCKET_IFNAME": "eth7"}, "wrong", "GLOO_SOCKET_IFNAME is eth7", "GLOO_SOCKET_IFNAME=eth0"),
        ({"resolves_to": "127.0.1.1"}, "wrong", "127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
        ({"open_files": 1024}, "wrong", "1024 open files", "ulimit -n"),
        ({"shared_memory_bytes": 64 << 20}, "wrong", "/dev/shm holds 67.1 MB", "--shm-size"),
        ({"infiniband": [{"device": "mlx5_0", "port": "1", "state": "4: ACTIVE"}], "locked_memory": 65536},
         "wrong", "locked memory", "ulimit -l unlimited"),
        ({"infiniband": [{"device": "mlx5_0", "port": "1", "state": "1: DOWN"}]}, "warning", "mlx5_0 port 1", "NCCL_IB_HCA"),
        ({"threads": 96}, "warning", "threads on 96 CPUs", "OMP_NUM_THREADS=48"),
        ({"gpu": None}, "wrong", "rank 3 (n1) has no GPU", "nvidia-smi"),
        ({"gpu.uuid": "GPU-2"}, "wrong", "ranks 2, 3 hold the same GPU", "as many processes"),
        ({"gpu.free_bytes": 40 * GB}, "warning", "40.0 GB of 80.0 GB", "nvidia-smi"),
        ({"gpu.name": "H20"}, "warning", "GPUs: H800 on ranks 0, 1, 2; H20 on ranks 3", "one kind"),
        ({"compute": 1e14}, "warning", "rank 3 (n1): matrix products at 17%", "every step waits"),
        ({"disk.read_rate": 1e8}, "warning", "rank 3 (n1): reading from disk at 5%", "every step waits"),
        ({"disk": {"error": "Read-only file system"}}, "wrong", "cannot write", "another --folder"),
        ({"disk.free_bytes": GB}, "wrong", "1.0 GB free", "make room"),
        ({"shared": False}, "wrong", "ranks 3 do not see", "mount"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_each_broken_thing_is_found_once_and_with_its_cure(changes, level, what, cure):
    ranks = healthy()
    for name, value in changes.items():
        *path, last = name.split(".")
        for rank in ranks[2:] if name in HOST_WIDE else ranks[3:]:
            place = rank
            for key in path:
                place = place[key]
            place[last] = value
    findings = [
        f for f in found(ranks, needs_bytes=700 * GB) if not f.what.startswith("GLOO_SOCKET_IFNAME:")
    ]  # differs
    assert [(f.level, what in f.what, cure in f.cure) for f in findings] == [(level, True, True)], findings


def test_slow_links_false_numbers_and_wrong_clocks_are_told_by_name():
    network = wire()
    network["links"][0] = (3, 0, 2e9)
    network["false"] = {"2": ["all-reduce"]}
    network["clocks"] = [(0.0, 0.0), (0.3, 0.001), (-40.0, 0.001), (0.5, 0.45)]  # the last may be the line's doing
    findings = found(healthy(), network)
    assert [f.level for f in findings] == ["wrong", "wrong", "warning", "warning"]
    text = "\n".join(f.what for f in findings)
    assert "rank 2 (n1): all-reduce gave false numbers" in text
    assert "rank 3 (n1) to rank 0 (n0): 2.0 GB/s, 10% of the median" in text
    assert "rank 2 (n1): its clock is -40.00 s off" in text
    assert "rank 1 (n0): its clock is +0.30 s off" in text


def test_a_missing_rank_is_named():
    store = dist.HashStore()
    roll_call(store, 0, 1, timedelta(seconds=5))
    assert roll_call(store, 2, 4, timedelta(milliseconds=50)) == [1, 3]


def test_a_master_out_of_reach_is_said_with_the_cure(monkeypatch):
    for name, value in (environment := {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9",
    }).items():  # fmt: skip
        monkeypatch.setenv(name, value)  # where torch's own rendezvous looks
    with pytest.raises(ValueError, match=r"rank 1 does not meet the others at 127\.0\.0\.1:9 .*--rdzv-endpoint"):
        meet(environment, "cpu", timedelta(milliseconds=300))


def test_one_process_is_examined_without_a_network(tmp_path):
    report = examine(Examination(folder=tmp_path, disk_bytes=1 << 20), {"NCCL_DEBUG": "INFO", "SECRET": "x"}, CPU)
    (mine,) = report.ranks
    assert report.network == {}
    assert mine["environment"] == {"NCCL_DEBUG": "INFO"}
    assert mine["compute"] > 0
    assert mine["disk"]["write_rate"] > 0
    assert mine["disk"]["read_rate"] > 0
    assert mine["shared"]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_hash_of_the_sources_changes_with_one_byte(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = probes.source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert probes.source_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert probes.source_hash(tmp_path) != before


def test_wrong_questions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        Examination(folder=tmp_path / "none")
    with pytest.raises(ValueError, match="at least 1"):
        Examination(folder=tmp_path, disk_bytes=0)


def examined(_group: Any, folder: str) -> dict[str, Any]:
    mine = Path(folder) / "shared"
    if dist.get_rank() == 1:  # as where a mount is missing
        mine = Path(folder) / "own"
    asked = Examination(folder=mine, disk_bytes=1 << 16, message_bytes=1 << 16)
    return examine(asked, {"NCCL_ALGO": f"of rank {dist.get_rank()}"}, CPU).to_json()


@pytest.mark.dist
def test_two_ranks_measure_each_other_and_agree_on_what_is_wrong(tmp_path):
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    first, second = run_ranks(examined, 2, tmp_path / "ranks", str(tmp_path))
    network = first["network"]
    assert network == second["network"]
    assert [r["rank"] for r in first["ranks"]] == [0, 1]
    assert network["false"] == {}
    assert min(network["all_reduce"], network["all_to_all"], network["latency_s"]) > 0
    assert sorted((source, rank) for source, rank, _ in network["links"]) == [(0, 1), (1, 0)]
    skew, doubt = network["clocks"][1]
    assert abs(skew) <= doubt + 1e-3  # one machine has one clock
    wrong = "\n".join(f["what"] for f in first["findings"] if f["level"] == "wrong")
    assert "ranks 1 do not see" in wrong
    assert "NCCL_ALGO: of rank 0 on ranks 0; of rank 1 on ranks 1" in wrong
    assert not first["healthy"]
