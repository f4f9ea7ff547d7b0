"""A disk that is really full: a small file system in memory. There are tests here only where one may be mounted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from millstream.brokers.base import GroupInfo
from millstream.errors import BrokerError, BrokerFull
from tests.sqlite.places import broker_at, eventually, ids, intact, joined, opened, outcomes, records


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True, capture_output=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def may_mount() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as directory:
        try:
            with small_disk(Path(directory), "1m"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


if may_mount():

    @pytest.mark.parametrize("size", ["1m", "12m"])
    async def test_on_a_full_disk_nothing_is_lost_and_all_goes_on_when_there_is_room(tmp_path: Path, size: str) -> None:
        with small_disk(tmp_path, size):
            async with opened(tmp_path / "shop.db") as broker:
                consumer = await joined(broker)
                confirmed: list[str] = []
                refused = 0
                for n in range(10_000):
                    try:
                        await broker.append("orders", records(f"e-{n}", size_bytes=4_000))
                        confirmed.append(f"e-{n}")
                    except BrokerFull as error:
                        assert "disk is full" in str(error)
                        refused += 1
                        if refused == 20:
                            break
                assert refused == 20
                assert confirmed
                try:
                    claims = await consumer.fetch(50, 0)
                except BrokerFull:
                    claims = []
                subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)

                async def go_on() -> GroupInfo:
                    await consumer.keep()
                    claims.extend(await consumer.fetch(1_000, 0.1))
                    return (await broker.admin.groups("orders"))[0]

                await eventually(go_on, lambda info: info.lag == 0)
                assert sorted(ids(claims)) == sorted(confirmed), "exactly what was confirmed, each once"
                assert all(await consumer.settle(outcomes(claims)))
                await broker.append("orders", records("again"))
                assert ids(await consumer.fetch(5, 1.0)) == ["again"]
                await consumer.close()
            assert intact(tmp_path / "shop.db")

    async def test_what_is_held_when_the_disk_fills_up_can_be_settled_once_there_is_room(tmp_path: Path) -> None:
        with small_disk(tmp_path, "4m"):
            async with opened(tmp_path / "shop.db") as broker:
                consumer = await joined(broker)
                await broker.append("orders", records(*(f"e-{n}" for n in range(100))))
                claims = await consumer.fetch(100, 0)
                os.posix_fallocate(filler := os.open(tmp_path / "filler", os.O_CREAT | os.O_RDWR), 0, free(tmp_path))
                os.close(filler)
                left = outcomes(claims)
                with pytest.raises(BrokerFull):
                    while left:  # what was written to the log before may be written again
                        assert await consumer.settle(left[:1]) == [True]
                        left = left[1:]
                        await broker.append("orders", records("more", size_bytes=100_000))
                (tmp_path / "filler").unlink()
                await consumer.keep()
                assert await consumer.settle(left) == [True] * len(left)
                await consumer.close()
            assert intact(tmp_path / "shop.db")

    async def test_a_disk_without_any_room_is_full_from_the_start(tmp_path: Path) -> None:
        with small_disk(tmp_path, "1m"):
            os.posix_fallocate(filler := os.open(tmp_path / "filler", os.O_CREAT | os.O_RDWR), 0, free(tmp_path))
            os.close(filler)
            broker = broker_at(tmp_path / "shop.db")
            with pytest.raises(BrokerError) as caught:
                await broker.open()
            assert isinstance(caught.value, BrokerFull), caught.value
            (tmp_path / "filler").unlink()
            await broker.open()
            await broker.close()
            assert intact(tmp_path / "shop.db")

    def free(path: Path) -> int:
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize
