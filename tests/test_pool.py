"""Memory for tensors from the pool: nothing overlaps, what is kept is bounded, limits and the system's no are heeded."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from lorafit.native import build, pool

MB = 1 << 20


@pytest.fixture(autouse=True)
def started():
    if not pool.start():
        pytest.skip(f"no pool here: {build.state()}")
    pool.keep(True)
    yield
    pool.keep(False)
    pool.keep(True)


# `laid`: blocks one after another, cut from one hole, while something else takes the room that there is for new ones. More than a
# quarter of their sum comes first.
BEFORE = """
import torch
from lorafit import machine
from lorafit.native import pool
assert pool.start()
MB = 1 << 20
def laid(*sizes):
    global other
    whole = torch.empty(sum(sizes) * MB, dtype=torch.uint8)
    place = whole.data_ptr()
    del whole
    blocks = [torch.empty(sizes[0] * MB, dtype=torch.uint8)]
    other = torch.empty(sum(sizes) * MB // 4, dtype=torch.uint8)
    blocks += [torch.empty(n * MB, dtype=torch.uint8) for n in sizes[1:]]
    places = [block.data_ptr() for block in blocks]
    assert [(p - place) // MB for p in places] == [sum(sizes[:i]) for i in range(len(sizes))]
    return blocks, places
"""


def alone(code: str) -> str:
    """What a process of its own prints that runs `code` with the pool started and `laid` at hand."""
    done = subprocess.run([sys.executable, "-c", BEFORE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHURN = """
#include <c10/core/CPUAllocator.h>
#include <thread>
#include <vector>
// Each thread marks the ends of its blocks with its own number, frees them in any order, and counts marks that changed.
extern "C" int churn(int threads, int turns) {
    std::vector<int> wrong(threads);
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++)
        all.emplace_back([&wrong, t, turns] {
            std::vector<std::pair<c10::DataPtr, size_t>> mine;
            unsigned random = t + 1;
            for (int turn = 0; turn < turns; turn++) {
                random = random * 1664525u + 1013904223u;
                if (mine.size() < 6 && random >> 31) {
                    size_t size = (random >> 8) % 3 ? (1 << 20) + (random >> 10) % (1 << 20) : 4096;
                    mine.emplace_back(c10::GetCPUAllocator()->allocate(size), size);
                    char* place = (char*)mine.back().first.get();
                    place[0] = place[size - 1] = t + 1;
                } else if (!mine.empty()) {
                    size_t one = (random >> 12) % mine.size();
                    char* place = (char*)mine[one].first.get();
                    wrong[t] += place[0] != t + 1 || place[mine[one].second - 1] != t + 1;
                    mine.erase(mine.begin() + one);
                }
            }
        });
    int sum = 0;
    for (int t = 0; t < threads; t++) all[t].join(), sum += wrong[t];
    return sum;
}
"""


def test_blocks_in_use_never_overlap_in_any_thread(tmp_path):
    # From C++, where no interpreter's lock stands between the threads; in a process of its own, since it might crash.
    compiler, _ = build._place(build._pool())
    (tmp_path / "churn.cpp").write_text(CHURN)
    library = build.Library("churn", "the test", (tmp_path / "churn.cpp",), build._pool().flags, build._pool().links)
    made = build._make(compiler, library, tmp_path / "churn.so")
    assert alone(f"import ctypes\nprint(ctypes.CDLL({str(made)!r}).churn(4, 40_000))\n") == "0"


def test_a_freed_block_serves_the_next_tensor_longer_or_shorter():
    pool.keep(False)
    pool.keep(True)
    most = torch.empty(32 * MB, dtype=torch.uint8)
    del most
    first = torch.empty(8 * MB, dtype=torch.uint8)
    start = first.data_ptr()
    del first
    same = torch.empty(8 * MB - 5, dtype=torch.uint8)  # the same after rounding up
    assert same.data_ptr() == start
    del same
    for size in (7, 9):
        before = pool.kept()
        other = torch.empty(size * MB, dtype=torch.uint8)
        assert pool.kept() < before
        other.fill_(size)
        assert int(other.min()) == int(other.max()) == size
        del other


def test_the_pages_of_a_resized_block_come_with_it():
    # What is in them isn't cleared, as it would be in pages that the system gives anew.
    said = alone("""
for before, after in ((8, 9), (8, 7)):
    x = torch.full((before * MB,), before, dtype=torch.uint8)
    del x
    y = torch.empty(after * MB, dtype=torch.uint8)
    least = min(before, after) * MB
    assert int(y[:least].min()) == int(y[:least].max()) == before, (before, after)
    del y
    pool.keep(False)
    pool.keep(True)
""")
    assert said == ""


def test_the_smallest_hole_that_is_large_enough_is_taken():
    said = alone("""
blocks, places = laid(30, 1, 8, 1, 20, 1)
for i in (0, 2, 4):
    blocks[i] = None
assert pool.kept() == 58 * MB
again = torch.empty(8 * MB, dtype=torch.uint8)
assert again.data_ptr() == places[2]
third = torch.empty(20 * MB, dtype=torch.uint8)
assert third.data_ptr() == places[4]
less = torch.empty(2 * MB, dtype=torch.uint8)  # a hole of 30 had better wait: there is room for more
assert pool.kept() == 30 * MB, pool.kept()
more = torch.empty(19 * MB, dtype=torch.uint8)  # no room any more: the hole is cut
assert more.data_ptr() == places[0] and pool.kept() == 11 * MB, pool.kept()
""")
    assert said == ""


def test_holes_side_by_side_are_one():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        said = alone(f"""
x = torch.empty(40 * MB, dtype=torch.uint8)
place = x.data_ptr()
del x
parts = [torch.empty(n * MB, dtype=torch.uint8) for n in (12, 13, 15)]
assert [part.data_ptr() - place for part in parts] == [0, 12 * MB, 25 * MB]
for i in {order}:
    parts[i] = None
assert pool.kept() == 40 * MB
assert torch.empty(40 * MB, dtype=torch.uint8).data_ptr() == place
""")
        assert said == ""


def test_a_hole_grows_where_there_is_no_room_for_another():
    said = alone("""
blocks, places = laid(12, 1, 10)
blocks[0].fill_(3)
blocks[0] = blocks[2] = None
assert pool.kept() == 22 * MB
more = torch.empty(16 * MB, dtype=torch.uint8)
assert pool.kept() == 10 * MB, pool.kept()
assert int(more[: 12 * MB].min()) == 3  # its pages came with it, uncleared
assert torch.empty(9 * MB, dtype=torch.uint8).data_ptr() == places[2]
""")
    assert said == ""


def test_what_lay_unused_longest_goes_first():
    said = alone("""
blocks, places = laid(9, 1, 8, 1, 7, 1)
for i in (2, 4, 0):
    blocks[i] = None
more = torch.empty(25 * MB, dtype=torch.uint8)  # the 9 grows, and for what is kept then there is no room
assert pool.kept() == 7 * MB, pool.kept()
assert torch.empty(7 * MB, dtype=torch.uint8).data_ptr() == places[4]
""")
    assert said == ""


def test_what_is_kept_is_given_up_before_memory_is_refused():
    said = alone("""
import resource
blocks = [torch.empty(n * MB, dtype=torch.uint8) for n in 5 * (40, 1)]
del blocks[::2]
assert pool.kept() == 200 * MB
resource.setrlimit(resource.RLIMIT_DATA, (machine.private_memory() - 60 * MB, -1))  # a limit set since
x = torch.empty(110 * MB, dtype=torch.uint8)
assert pool.kept() == 0
""")
    assert said == ""


def test_what_is_kept_was_in_use_at_once():
    # One process, since the bound is the most that was ever in use in it.
    said = alone("""
for n in range(1, 41):
    x = torch.empty(n * MB, dtype=torch.uint8)
    del x
    assert pool.kept() <= n * MB, (n, pool.kept())
a, b = torch.empty(30 * MB, dtype=torch.uint8), torch.empty(10 * MB, dtype=torch.uint8)
assert pool.kept() == 0
del a
assert pool.kept() == 30 * MB
machine._frugal()
assert pool.kept() == 0
del b
assert pool.kept() == 0
""")
    assert said == ""


def test_holes_between_tensors_that_stay_are_used_again():
    # What activation checkpointing does: of each layer a little stays between much that goes.
    said = alone("""
def step():
    stay = []
    for layer in range(30):
        gone = [torch.ones(n * MB, dtype=torch.uint8) for n in (12, 12, 7, 3)]
        stay.append(torch.ones(2 * MB, dtype=torch.uint8))
start = machine.peak_memory()
for _ in range(3):
    step()
print((machine.peak_memory() - start) // MB)
""")
    assert int(said) < 2 * 34 + 30 * 2 + 18  # a layer's while the one before it goes, all that stay, and some to spare


def test_tensors_of_a_small_micro_batch_are_served():
    # On the C library's heap those of some hundred tokens left holes that no other length filled.
    said = alone("""
x = torch.empty(200_000, dtype=torch.uint8)
del x
assert 200_000 <= pool.kept() < 220_000, pool.kept()
""")
    assert said == ""


def test_no_memory_is_an_error_that_is_known():
    said = alone("""
import resource
kept = torch.empty(100 * MB, dtype=torch.uint8)
del kept
resource.setrlimit(resource.RLIMIT_DATA, (machine.private_memory() + 20 * MB, -1))
fits = torch.empty(110 * MB, dtype=torch.uint8)  # with what was kept
del fits
try:
    torch.empty(400 * MB, dtype=torch.uint8)
except RuntimeError as error:
    assert machine.out_of_memory(error), error
    print(machine._reason(error))
""")
    assert "you tried to allocate 419430400 bytes" in said


def test_what_was_refused_does_not_count_as_once_in_use():
    said = alone("""
x = torch.empty(50 * MB, dtype=torch.uint8)
del x
for size in (1 << 50, 1 << 62):
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        pass
for n in (3, 9, 20, 40, 30, 7):
    x = torch.empty(n * MB, dtype=torch.uint8)
    del x
print(pool.kept() // MB)
""")
    assert int(said) <= 62  # 50 and a quarter


def test_a_forked_process_can_make_tensors_whatever_other_threads_do():
    said = alone("""
import os, threading, time
stop = False
def churn():
    while not stop:
        torch.empty(64 * MB, dtype=torch.uint8).view(-1)[::4096].fill_(1)
pool.keep(False)
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        torch.empty(2 * MB, dtype=torch.uint8)
        os._exit(0)
    until = time.monotonic() + 5
    while (done := os.waitpid(child, os.WNOHANG)[0]) == 0 and time.monotonic() < until:
        time.sleep(0.005)
    if not done:
        print("hangs")
        os.kill(child, 9)
        break
stop = True
for thread in threads:
    thread.join()
""")
    assert said == ""


def test_what_else_torch_does_with_memory():
    x = torch.arange(2 * MB, dtype=torch.uint8)
    x.resize_(5 * MB)
    assert torch.equal(x[: 2 * MB], torch.arange(2 * MB, dtype=torch.uint8))
    array = torch.ones(MB).numpy()  # holds the memory alone
    others = [torch.zeros(MB) for _ in range(4)]
    assert array.sum() == MB and not any(t.any() for t in others)
    shared = torch.ones(2 * MB, dtype=torch.uint8).share_memory_()
    assert shared.is_shared() and int(shared.sum()) == 2 * MB


def test_switched_off_there_is_none():
    with build.switched(False):
        assert build.pool() is None


def test_without_torchs_headers_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(build, "_no_pool", "")
    assert build.pool() is None
    assert "the pool" in build._no_pool
    assert "pool" in next((tmp_path / "cache").glob("*.failed")).name


def test_what_is_kept_is_given_back_and_a_limit_that_ends_is_over():
    code = """
def fill():
    held = [torch.ones(4 * MB) for _ in range(4)]
    del held
fill()
print(pool.kept() > 0)
pool.give_back()
print(pool.kept())
with machine.memory_limit(machine.memory() + 10_000 * MB):
    fill()
    print(pool.kept())
    pool.give_back()
    fill()
    print(pool.kept())
fill()
print(pool.kept() > 0)
"""
    assert alone(code).split() == ["True", "0", "0", "0", "True"]


def test_a_pool_that_cannot_be_built_is_said_and_planned_without(monkeypatch):
    monkeypatch.setattr(build, "_no_pool", "")
    assert build.pooled() and "pool" not in build.state()

    def fails(library):
        raise build._NotBuilt("no headers")

    monkeypatch.setattr(build, "_find", fails)
    assert build.pool() is None
    assert not build.pooled() and build.state().endswith(", without the pool (no headers)")


def test_a_failed_build_is_tried_again_after_a_while(tmp_path):
    place = tmp_path / "pool-1.so"
    place.with_suffix(".failed").write_text("no headers")
    assert build._failed(place) == "no headers"
    then = time.time() - build.RETRY - 5
    os.utime(place.with_suffix(".failed"), (then, then))
    assert build._failed(place) == ""
