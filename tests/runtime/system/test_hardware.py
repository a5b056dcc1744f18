"""Reading a machine: this one for real, a Jetson from the files it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.system import hardware


def test_this_machine_has_a_cpu_and_memory() -> None:
    cpu = hardware.detect_cpu()
    assert cpu.model
    assert 1 <= cpu.physical_cores <= cpu.logical_cores
    assert set(cpu.features) <= set(hardware.CPU_FEATURES)
    total, available = hardware.read_memory_bytes()
    assert 0 < available <= total


@pytest.mark.skipif(hardware.is_tegra(), reason="this is a Jetson")
def test_this_is_no_jetson() -> None:
    assert hardware.detect_jetson() is None


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3", "JetPack 6"),
        ("# R38 (release), REVISION: 4.0, GCID: 1", "38.4.0", "JetPack 7"),
        ("# R39 (release), REVISION: 1.0, GCID: 1", "39.1.0", "JetPack 7.2"),
        ("unreadable", None, None),
    ],
)
def test_a_jetson_is_told_by_its_release_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, l4t: str | None, jetpack: str | None
) -> None:
    (tmp_path / "release").write_text(release)
    (tmp_path / "model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(hardware, "_TEGRA_RELEASE", tmp_path / "release")
    monkeypatch.setattr(hardware, "_DEVICE_TREE_MODEL", tmp_path / "model")
    found = hardware.detect_jetson()
    assert found is not None
    assert found.model == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


def test_a_jetson_container_without_the_release_file_is_told_by_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_text("NVIDIA Jetson Orin Nano\0")
    monkeypatch.setattr(hardware, "_TEGRA_RELEASE", tmp_path / "absent")
    monkeypatch.setattr(hardware, "_DEVICE_TREE_MODEL", tmp_path / "model")
    assert hardware.is_tegra()


def test_the_second_thread_of_a_core_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(4):
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")
    monkeypatch.setattr(hardware, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert hardware.count_physical_cores() == 2


def test_a_missing_command_has_no_output() -> None:
    assert hardware.run_command("no-such-command-anywhere") is None
    assert hardware.run_command("false") is None


@pytest.mark.parametrize(("vendor", "served"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_openvino_plug_in_serves_intel_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, served: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some\n")
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert (hardware.find_openvino_problem() == "") is served
    assert served or vendor in hardware.find_openvino_problem()


def test_the_largest_cache_is_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_TOPOLOGY", tmp_path)
    assert hardware.read_cache_bytes() == 0
    for index, size in enumerate(("32K", "512K", "32768K", "odd", "16M")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert hardware.read_cache_bytes() == 32 * 1024**2
