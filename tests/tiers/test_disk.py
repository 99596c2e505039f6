"""The disk tier: its files and budget; a full disk, missing permissions and damaged files cost only cached blocks."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.serving import oracle_engine, request, run_checked, smallest_program, truth

from intaglio.runtime import BlockKey, BlockNames, BlockScope, Engine
from intaglio.tiers import BlockFileError, DiskTier
from intaglio.tiers.block_file import file_bytes, read_block
from intaglio.tiers.directory import PARTIAL, BlockDirectory, NoRoom
from intaglio.tiers.memory import BlockMemory

SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
SIZE = 4
SCOPE = BlockScope.of(smallest_program(), SIZE, "oracle", "weights A", "1")
CONTENT = np.arange(32, dtype=np.uint8)


def key_of(*tokens: int, scope: BlockScope = SCOPE) -> BlockKey:
    """The key of a first block."""
    names = BlockNames(scope.digest, SIZE)
    return BlockKey(names.of(tokens)[0], names.root(), tokens)


KEY = key_of(1, 2, 3, 4)


def tier_of(folder: Path, scope: BlockScope = SCOPE, budget: int = 1 << 20) -> tuple[DiskTier, list[str]]:
    """A disk tier, and the list of what it reports."""
    reports: list[str] = []
    return DiskTier(folder, budget, scope, reports.append), reports


def engine_on(tier: DiskTier, pages: int = 40) -> Engine:
    engine = oracle_engine(pages=pages, page_tokens=SIZE, scope=tier.scope, connector=tier)
    engine.offload.timeout = 1e9  # its clock counts readings, while the tier's threads take real time
    return engine


def ask(engine: Engine, prompt: list[int], id: str = "r", **options: object) -> tuple[list[int], int]:
    """Run a request to its end. Returns its output, which is checked, and its cached tokens."""
    [s] = engine.add(request(id, prompt, **{"max_tokens": 5, **options}))
    run_checked(engine)
    assert s.output == truth(s) and s.finish_reason == "length"
    return s.output, s.cached_tokens


def test_next_engine_starts_with_the_blocks_of_the_last(tmp_path: Path) -> None:
    prompt, outputs = list(range(30)), []
    for start in range(3):
        tier, reports = tier_of(tmp_path)
        output, cached = ask(engine_on(tier), prompt)
        outputs.append(output)
        tier.close()
        assert cached == (28 if start else 0) and reports == []
        assert (tier.counts.hits, tier.counts.saved) == ((7, 0) if start else (0, 8))
    assert outputs[0] == outputs[1] == outputs[2]
    tier, _ = tier_of(tmp_path)
    assert ask(engine_on(tier), [*prompt[:10], 90, *prompt[11:]])[1] == 8  # to the first token that differs
    assert ask(engine_on(tier), prompt, salt="a")[1] == 0
    tier.close()
    assert tier.counts.corrupt == tier.counts.errors == 0


def test_engines_of_another_model_or_instruction_set_get_nothing(tmp_path: Path) -> None:
    tier, _ = tier_of(tmp_path)
    ask(engine_on(tier), list(range(30)))
    tier.close()
    others = {"program": "x", "weights": "weights B", "kv_format": "int8", "numerics": "host avx2", "version": "2"}
    for name, value in others.items():
        other, reports = tier_of(tmp_path, replace(SCOPE, **{name: value}))
        assert ask(engine_on(other), list(range(30)))[1] == 0
        other.close()
        assert other.counts.hits == other.counts.corrupt == 0 and other.counts.saved == 8 and reports == []


def damage(rng: random.Random, file: Path, others: list[Path]) -> str:
    """Damage a block's file in one of many ways. Returns the way."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(("bit", "bits", "cut", "longer", "empty", "zeros", "other block", "other model", "halves"))
    if kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randint(2, 40)):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        if content == file.read_bytes():
            content[-1] ^= 1
    elif kind == "cut":
        del content[rng.randrange(1, len(content)) :]
    elif kind == "longer":
        content += rng.randbytes(rng.randint(1, 99))
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        content[rng.randrange(len(content) - 33) :] = bytes(len(content))
        del content[len(file.read_bytes()) :]
    elif kind == "other block":
        content[:] = rng.choice([f for f in others if f != file]).read_bytes()
    elif kind == "other model":  # a valid file of the same tokens, of other weights
        scope = replace(SCOPE, weights="weights B")
        content[:] = b"".join(bytes(part) for part in file_bytes(scope, key_of(1, 2, 3, 4, scope=scope), CONTENT))
    else:
        half = len(content) // 2
        content[:half] = rng.choice([f for f in others if f != file]).read_bytes()[:half]
    file.write_bytes(content)
    return kind


def end_lease(rng: random.Random, tier: DiskTier, names: Sequence[str]) -> str:
    """Pin blocks and end their lease in one of several ways; nothing counts as handed under it. Returns the way."""
    lease = tier.pin(names, 9.0)
    assert tier.handed(lease, names) == len(names)
    file = tier.directory.leases.folder / f"{lease}.lease"
    kind = rng.choice(("run out", "damaged lease", "endless", "released"))
    if kind == "run out":
        os.utime(file, ns=(1, time.time_ns() - rng.randrange(1, 10**12)))
    elif kind == "damaged lease":
        times, content = file.stat().st_mtime_ns, bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        os.utime(file, ns=(times, times))
    elif kind == "endless":
        os.utime(file, ns=(1, time.time_ns() + 10**15))
    else:
        tier.release(lease)
    assert (tier.handed(lease, names) if rng.random() < 0.5 else tier.renew(lease, 9.0)) == 0
    return kind


def test_none_of_1000_damaged_files_reaches_an_answer(tmp_path: Path) -> None:
    print(f"TEST_SEED={SEED}")
    rng = random.Random(SEED)
    tier, reports = tier_of(tmp_path)
    engine = engine_on(tier)
    prompts = [[rng.randrange(90) for _ in range(rng.randint(9, 40))] for _ in range(8)]
    for i, prompt in enumerate(prompts):
        ask(engine, prompt, f"first {i}")
    kinds = set()
    for i in range(1000):
        tier.flush()
        prompt = rng.choice(prompts)
        names = engine.block_names.of(prompt[:-1])
        if i % 10 == 9:
            kinds.add(end_lease(rng, tier, names))
            assert tier.counts.expired == i // 10 + 1 and not tier.directory.leases.pinned()
        files = [tier.directory.file(name) for name in names]
        at = rng.randrange(len(files))
        kinds.add(damage(rng, files[at], list(tmp_path.rglob("*.kv"))))
        engine.pool.reset_prefix_cache()  # as after a restart
        before = tier.counts.hits
        _, cached = ask(engine, prompt, f"r{i}")
        assert cached == at * SIZE and tier.counts.hits - before == at
        assert tier.counts.corrupt == i + 1
    tier.close()
    assert len(kinds) == 13 and len(reports) == 1 and "cannot be used and is computed" in reports[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b[:-1], "bytes; this block has"),
        (lambda b: b + b"x", "bytes; this block has"),
        (lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:], "checksum"),
        (lambda b: b[:-40] + bytes([b[-40] ^ 128]) + b[-39:], "checksum"),
        (lambda b: b"intaglio K/V 0\n\n" + b[16:], "does not begin as a K/V block"),
        (lambda b: b"", "does not begin as a K/V block"),
    ],
)
def test_file_that_is_not_as_it_was_written_is_refused(tmp_path: Path, change: object, why: str) -> None:
    file = tmp_path / "block.kv"
    written = b"".join(bytes(part) for part in file_bytes(SCOPE, KEY, CONTENT))
    file.write_bytes(written)
    assert np.array_equal(read_block(file, SCOPE, KEY, 32), CONTENT)
    file.write_bytes(change(written))  # type: ignore[operator]
    with pytest.raises(BlockFileError, match=why):
        read_block(file, SCOPE, KEY, 32)


def test_file_of_another_block_or_scope_is_refused_though_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "block.kv"
    others = [
        (SCOPE, key_of(1, 2, 3, 5)),
        (SCOPE, replace(KEY, parent="f" * 64)),
        (SCOPE, replace(KEY, name="f" * 64)),
        *((replace(SCOPE, **{name: "X" * len(getattr(SCOPE, name))}), KEY) for name in ("weights", "numerics")),
    ]
    for scope, key in others:
        file.write_bytes(b"".join(bytes(part) for part in file_bytes(scope, key, CONTENT)))
        with pytest.raises(BlockFileError, match="another block, or of another model"):
            read_block(file, SCOPE, KEY, 32)


def test_least_recently_used_files_are_deleted_and_children_before_parents(tmp_path: Path) -> None:
    names = [f"{i:064x}" for i in range(20)]
    directory = BlockDirectory(tmp_path, 1000)
    for at, name in enumerate(names[:10]):
        assert directory.write(name, [bytes(100)]) == 0
        os.utime(directory.file(name), ns=(at, at))
    directory.touch(names[:3])  # a chain of three: used last, the third of them longest ago
    assert directory.write(names[10], [bytes(100)]) == 2  # down to 31/32 of the budget
    assert [i for i, name in enumerate(names) if directory.has(name)] == [0, 1, 2, *range(5, 11)]
    for name in names[5:10]:
        directory.remove(name)
    directory.touch([names[10]])
    directory.touch(names[:3])
    other = BlockDirectory(tmp_path, 250)  # an engine of a smaller budget
    assert other.write(names[11], [b"x"]) == 2
    assert [i for i, name in enumerate(names) if directory.has(name)] == [0, 1, 11]


def test_a_file_that_cannot_be_deleted_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the file system refuses to delete keeps its bytes; one that another process deleted does not."""
    directory = BlockDirectory(tmp_path, 1000)
    names = [f"{i:064x}" for i in range(10)]
    for at, name in enumerate(names, 1):
        directory.write(name, [bytes(100)])
        os.utime(directory.file(name), ns=(at, at))
    refused, gone = (str(directory.file(names[i])) for i in (0, 1))
    unlink = os.unlink

    def some(path: str) -> None:
        if path == refused:
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path)
        if path == gone:
            raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "unlink", some)
    directory.budget = 850
    assert directory.evict() == 1  # the third; the first stays, the second was gone
    assert directory.held == 800 - 100 * (directory.held < 800)
    assert directory.held == sum(100 for name in names if directory.has(name)) and directory.has(names[0])


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_no_block_is_deleted_before_the_blocks_that_follow_it(kind: str, tmp_path: Path) -> None:
    """Without the block before it a block is of no use; blocks are written in the order in which they are computed."""
    print(f"TEST_SEED={SEED}")
    rng, parents, deleted = random.Random(SEED), dict[str, str](), 0
    store = BlockDirectory(tmp_path, 2000) if kind == "files" else BlockMemory(2000)
    for step in range(200):
        kept = [name for name in parents if store.has(name)]
        if kept and rng.random() < 0.3:
            chain = [rng.choice(kept)]
            while parents[chain[0]]:
                chain.insert(0, parents[chain[0]])
            store.touch(chain)
        else:
            name = f"{step:064x}"
            parents[name] = rng.choice([*kept[-3:], *kept, ""])
            with suppress(NoRoom):  # the other blocks were used later
                deleted += store.write(name, [bytes(100)], parents[name])
        assert all(store.has(parents[name]) for name in parents if parents[name] and store.has(name))
    assert deleted > 30


def test_the_blocks_of_a_sequence_count_as_used_at_its_end(tmp_path: Path) -> None:
    tier, _ = tier_of(tmp_path)
    engine = engine_on(tier)
    [s] = engine.add(request("r", list(range(30)), max_tokens=40))
    while len(s.output) < 30:
        engine.step()
    tier.flush()
    now = time.time_ns()
    run_checked(engine)
    tier.flush()
    names = BlockNames(SCOPE.digest, SIZE).of([*range(30), *s.output[:-1]])
    used = [tier.directory.file(name).stat().st_mtime_ns for name in names]
    assert used == sorted(used, reverse=True) and len(set(used)) == len(names) > 12
    assert used[0] >= now
    tier.close()


def test_directory_is_made_for_its_user_only_and_an_existing_one_keeps_its_mode(tmp_path: Path) -> None:
    for name, mode in (("new", 0o700), ("shared", 0o750)):
        folder = tmp_path / name
        if name == "shared":
            folder.mkdir()
            folder.chmod(mode)
        BlockDirectory(folder, 1000).write("ab" * 32, [b"x"])
        assert folder.stat().st_mode & 0o777 == mode


def test_budget_holds_with_two_engines_on_one_directory(tmp_path: Path) -> None:
    print(f"TEST_SEED={SEED}")
    budget, rng = 24000, random.Random(SEED)
    pairs = [tier_of(tmp_path, budget=budget) for _ in range(2)]
    engines = [engine_on(tier) for tier, _ in pairs]
    for i in range(60):
        which = rng.randrange(2)
        ask(engines[which], [rng.randrange(90) for _ in range(20)], f"r{i}")
        pairs[which][0].flush()
        held = sum(f.stat().st_size for f in tmp_path.rglob("*.kv"))
        assert held <= budget * (1 + 2 / 16) + 2000
    for tier, reports in pairs:
        tier.close()
        assert tier.counts.evicted > 0 and tier.counts.corrupt == 0 and reports == []


def test_partial_files_of_killed_processes_are_never_read_and_deleted_in_the_end(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from intaglio.tiers import directory\n"
        "directory.Path.replace = lambda self, to: os.kill(os.getpid(), 9)\n"
        "directory.BlockDirectory(pathlib.Path(sys.argv[1]), 1000).write('ab' * 32, [b'begun'])\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    [partial] = tmp_path.rglob(f".*{PARTIAL}")
    directory = BlockDirectory(tmp_path, 1000)
    directory.scan()
    assert not directory.has("ab" * 32) and partial.exists()  # another process may be writing it
    os.utime(partial, (1, 1))
    directory.scan()
    assert not partial.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_engine_serves_on_when_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    tier, reports = tier_of(tmp_path)
    monkeypatch.setattr(tier.directory, "write", refuse)
    engine = engine_on(tier)
    for i in range(3):
        ask(engine, list(range(i, 30)), f"r{i}")
        tier.flush()
    assert len(reports) == 1 and os.strerror(code) in reports[0] and "cannot be saved" in reports[0]
    assert tier.counts.errors >= 1 and tier.counts.saved == 0
    monkeypatch.undo()
    monkeypatch.setattr(tier, "writes_from", 0.0)  # as after RETRY seconds
    ask(engine, list(range(50, 80)), "later")
    tier.close()
    assert tier.counts.saved == 8 and len(reports) == 1


def test_engine_serves_on_when_files_cannot_be_read_or_the_directory_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = tier_of(tmp_path / "d")
    ask(engine_on(tier), list(range(30)))
    tier.close()

    def denied(*_: object) -> np.ndarray:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("intaglio.tiers.directory.read_block", denied)
    tier, reports = tier_of(tmp_path / "d")
    assert ask(engine_on(tier), list(range(30)))[1] == 0
    tier.close()
    assert tier.counts.errors == 1 and len(reports) == 1 and "Permission denied" in reports[0]
    monkeypatch.undo()
    (tmp_path / "f").write_text("a file")
    tier, reports = tier_of(tmp_path / "f")
    assert ask(engine_on(tier), list(range(30)))[1] == 0
    tier.close()
    assert tier.counts.errors >= 1 and len(reports) == 1 and "cannot be saved" in reports[0]


def test_file_deleted_between_lookup_and_load_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, reports = tier_of(tmp_path)
    engine = engine_on(tier)
    ask(engine, list(range(30)))
    tier.flush()
    engine.pool.reset_prefix_cache()
    tier.directory.file(engine.block_names.of(range(30))[3]).unlink()
    monkeypatch.setattr(tier, "lookup", len)
    assert ask(engine, list(range(30)))[1] == 12
    tier.close()
    assert (tier.counts.hits, tier.counts.corrupt, reports) == (3, 0, [])


def test_blocks_beyond_the_queue_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intaglio.tiers.store.QUEUE_BYTES", 70)  # two blocks of 32 bytes
    tier, _ = tier_of(tmp_path)
    tier.writer.submit(lambda: tier.reader.submit(lambda: None).result())  # keeps the order; the queue fills meanwhile
    for i in range(50):
        tier.save(key_of(i, i, i, i), CONTENT)
    tier.close()
    assert tier.counts.saved + tier.counts.dropped == 50 and tier.counts.saved >= 2
    tier.save(KEY, CONTENT)  # after close(): dropped too
    assert tier.counts.dropped + tier.counts.saved == 51 and tier.load([KEY], 32).wait(0)


def test_recurrent_model_does_not_use_the_tier_and_says_so(tmp_path: Path) -> None:
    tier, reports = tier_of(tmp_path)
    engine = oracle_engine(pages=40, slots=8, connector=tier)
    ask(engine, list(range(30)))
    tier.close()
    assert reports == [
        "K/V blocks are not kept outside the engine: smallest has recurrent state, which is not kept with them"
    ]
    assert not list(tmp_path.iterdir())


def test_a_load_that_is_cancelled_reads_no_further_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, _ = tier_of(tmp_path)
    keys = [key_of(i, 0, 0, 0) for i in range(20)]
    for key in keys:
        tier.save(key, CONTENT)
    tier.flush()
    reached, go, read = threading.Event(), threading.Event(), list[str]()

    def slow(file: Path, scope: BlockScope, key: BlockKey, size: int) -> np.ndarray:
        read.append(key.name)
        reached.set()
        assert go.wait(120)
        return read_block(file, scope, key, size)

    monkeypatch.setattr("intaglio.tiers.directory.read_block", slow)
    load = tier.load(keys, CONTENT.nbytes)
    assert reached.wait(120)
    load.cancel()
    go.set()
    assert load.wait(120) and read == [keys[0].name] and len(load.blocks()) == 1
    tier.close()


def test_a_tier_may_be_closed_while_blocks_are_saved_and_loaded(tmp_path: Path) -> None:
    for _ in range(20):
        tier, reports = tier_of(tmp_path)
        begun, failed = threading.Barrier(2), list[BaseException]()

        def use(tier: DiskTier = tier, begun: threading.Barrier = begun, failed: list[BaseException] = failed) -> None:
            begun.wait()
            try:
                for i in range(50):
                    tier.save(key_of(i, 1, 1, 1), CONTENT)
                    tier.load([KEY], CONTENT.nbytes)
                    tier.touch([KEY.name])
            except BaseException as e:
                failed.append(e)

        thread = threading.Thread(target=use)
        thread.start()
        begun.wait()
        tier.close()
        thread.join()
        assert not failed and not reports
        tier.flush()  # of a closed tier: nothing waits
        assert tier.load([KEY], CONTENT.nbytes).wait(0)
