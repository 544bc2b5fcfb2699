"""Stores: the same contract for each of them, with a real Redis; and what is sealed stays so."""

from __future__ import annotations

import base64
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.stores import Entry, Limits, Store, StoreUnavailable, open_store
from serving.stores.redis import RedisStore
from serving.stores.sealed import SealedStore, read_key
from synapse_arch.errors import ConfigError, StateError
from tests.serving.programs import free_port, redis_server

Make = Callable[[Limits], Store]
LIMITS = Limits(ttl=100.0, most_bytes=1000, most_owned=3)
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "redis", "sealed"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Opens the store; those that processes can share open the same one each time."""
    opened: list[Store] = []

    def open_one(limits: Limits) -> Store:
        if request.param == "redis":
            where = request.getfixturevalue("redis_url")
        else:
            where = f"sqlite:{tmp_path / 'sessions.db'}" if request.param == "sqlite" else "memory"
        opened.append(open_store(where, limits, key=KEY if request.param == "sealed" else None))
        return opened[-1]

    yield open_one
    for store in opened:
        if isinstance(store, RedisStore):
            store._client.flushall()
        store.close()


@pytest.fixture
def store(make: Make) -> Store:
    return make(LIMITS)


def entry(name: str, version: int = 1, *, used: float = 1000.0, size: int = 10, owner: str = "ann") -> Entry:
    data = (name.encode() + b"\0\xff\r\n" * size)[:size]
    return Entry(name, owner, version, tokens=7, created=999.25, used=used, data=data)


def test_what_is_kept_comes_back(store: Store) -> None:
    assert store.load("a", 1000.0) is None
    assert store.save(entry("a"))
    assert store.load("a", 1000.0) == entry("a")
    assert store.delete("a")
    assert not store.delete("a")
    assert store.load("a", 1001.0) is None


def test_compare_and_set(store: Store) -> None:
    assert not store.save(entry("a", 2))
    assert store.save(entry("a", 1))
    assert not store.save(entry("a", 1, size=99))
    assert store.save(entry("a", 2, size=20))
    assert not store.save(entry("a", 2, size=30))
    found = store.load("a", 1000.0)
    assert found is not None
    assert (found.version, len(found.data)) == (2, 20)
    store.delete("a")
    assert not store.save(entry("a", 3))  # forgotten in the meantime


def test_of_many_writers_one_wins(make: Make, request: pytest.FixtureRequest) -> None:
    shared = request.node.callspec.params["make"] in ("sqlite", "redis")
    stores = [make(LIMITS) for _ in range(6)] if shared else [make(LIMITS)] * 6
    store = stores[0]
    assert store.save(entry("a"))
    for version in range(2, 6):
        won: list[int] = []
        start = threading.Barrier(6)

        def write(number: int, version: int = version, start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            if stores[number].save(entry("a", version, size=number + 1)):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = store.load("a", 1000.0)
        assert len(won) == 1
        assert found is not None
        assert len(found.data) == won[0] + 1


def test_listed_by_owner_the_latest_used_first(store: Store) -> None:
    for name, owner, used in (("a", "ann", 1000.0), ("b", "bob", 1001.0), ("c", "ann", 1002.0)):
        assert store.save(entry(name, owner=owner, used=used))
    assert [one.id for one in store.owned("ann", 1003.0)] == ["c", "a"]
    assert store.load("a", 1004.0)
    (first, second) = store.owned("ann", 1005.0)
    assert (first.id, first.used, second.id) == ("a", 1004.0, "c")
    assert first == entry("a", used=1004.0).summary
    assert store.owned("eve", 1003.0) == []


def test_unused_for_too_long_is_gone(store: Store) -> None:
    store.save(entry("a", used=1000.0))
    store.save(entry("b", used=1050.0))
    assert store.load("a", 1099.0) is not None
    assert store.load("b", 1151.0) is None
    assert [one.id for one in store.owned("ann", 1151.0)] == ["a"]
    assert store.usage(1151.0)[0] == 1
    assert store.usage(1300.0) == (0, 0)
    assert store.save(entry("b", used=1300.0))


def test_the_longest_unused_makes_room(store: Store) -> None:
    for number, name in enumerate("abc"):
        store.save(entry(name, used=1000.0 + number, size=300, owner=name))
    store.load("a", 1010.0)
    store.save(entry("d", used=1011.0, size=300, owner="d"))
    assert store.load("b", 1012.0) is None
    assert all(store.load(name, 1013.0) for name in "acd")
    count, size = store.usage(1014.0)
    assert count == 3
    assert size <= LIMITS.most_bytes


def test_whoever_holds_most_makes_room(make: Make) -> None:
    store = make(LIMITS._replace(most_owned=10))
    store.save(entry("a", used=1000.0, size=230, owner="ann"))
    for number in range(8):
        assert store.save(entry(f"b{number}", used=1001.0 + number, size=200, owner="bob"))
    assert [one.id for one in store.owned("ann", 1010.0)] == ["a"]
    assert [one.id for one in store.owned("bob", 1010.0)] == ["b7", "b6", "b5"]
    assert store.save(entry("a2", used=1011.0, size=230, owner="ann"))
    assert [len(store.owned(owner, 1012.0)) for owner in ("ann", "bob")] == [2, 2]
    assert store.save(entry("a3", used=1013.0, size=230, owner="ann"))  # she would hold most
    assert [one.id for one in store.owned("ann", 1014.0)] == ["a3", "a2"]


def test_an_owners_longest_unused_makes_room_for_its_own(store: Store) -> None:
    store.save(entry("x", used=990.0, owner="bob"))
    for number, name in enumerate("abcd"):
        store.save(entry(name, used=1000.0 + number))
    assert [one.id for one in store.owned("ann", 1010.0)] == ["d", "c", "b"]
    assert store.load("x", 1010.0) is not None
    assert store.save(entry("b", 2, used=1011.0))  # its own next version costs nobody a place
    assert len(store.owned("ann", 1012.0)) == 3


def test_bytes_are_counted_right(store: Store) -> None:
    _, none = store.usage(1000.0)
    store.save(entry("a", size=100))
    _, one = store.usage(1000.0)
    store.save(entry("a", 2, size=50))
    _, less = store.usage(1000.0)
    store.delete("a")
    assert (none, one - less, store.usage(1000.0)) == (0, 50, (0, 0))


@pytest.mark.parametrize("make", ["sqlite", "redis"], indirect=True)
def test_processes_share_it(make: Make) -> None:
    first, second = make(LIMITS), make(LIMITS)
    assert first.save(entry("a"))
    assert second.load("a", 1000.0) == entry("a")
    assert second.save(entry("a", 2))
    assert not first.save(entry("a", 2))


class TestSealed:
    def test_nothing_can_be_read_or_changed(self) -> None:
        inner = open_store("memory", LIMITS)
        sealed = SealedStore(inner, KEY)
        sealed.save(entry("a"))
        kept = inner.load("a", 1000.0)
        assert kept is not None
        assert entry("a").data[:4] not in kept.data
        changed = [
            kept._replace(data=kept.data[:-1] + bytes([kept.data[-1] ^ 1])), kept._replace(data=b""),
            kept._replace(owner="eve"), kept._replace(tokens=8), kept._replace(data=kept.data[:5]),
        ]  # fmt: skip
        for bad in changed:
            inner.delete("a")
            inner.save(bad)
            with pytest.raises(StateError, match="sealed with this server's key"):
                sealed.load("a", 1000.0)
        inner.delete("a")
        inner.save(kept)
        assert sealed.load("a", 1000.0) is not None
        with pytest.raises(StateError):
            SealedStore(inner, bytes(32)).load("a", 1000.0)

    def test_an_older_version_put_back_is_not_opened(self) -> None:
        inner = open_store("memory", LIMITS)
        sealed = SealedStore(inner, KEY)
        sealed.save(entry("a"))
        old = inner.load("a", 1000.0)
        assert old is not None
        sealed.save(entry("a", 2))
        inner.save(old._replace(version=3))
        with pytest.raises(StateError):
            sealed.load("a", 1000.0)

    def test_two_savings_of_one_text_differ(self) -> None:
        inner = open_store("memory", LIMITS)
        for name in "ab":
            SealedStore(inner, KEY).save(entry(name)._replace(data=b"same"))
        first, second = (inner.load(name, 1000.0) for name in "ab")
        assert first is not None
        assert second is not None
        assert first.data != second.data

    @pytest.mark.parametrize("text", ["", "short", "!" * 44, base64.b64encode(bytes(31)).decode()])
    def test_keys(self, text: str) -> None:
        with pytest.raises(ConfigError, match="32 bytes in base64"):
            read_key(text)
        assert read_key(base64.urlsafe_b64encode(KEY).decode() + "\n") == KEY


class TestOpening:
    @pytest.mark.parametrize("where", ["", "disk", "sqlite:", "redis", "memory:x"])
    def test_unknown(self, where: str) -> None:
        with pytest.raises(ConfigError, match="--session-store: expected memory, sqlite:PATH or redis"):
            open_store(where, LIMITS)

    def test_no_folder_and_no_database(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="a database file"):
            open_store(f"sqlite:{tmp_path / 'none' / 'x.db'}", LIMITS)
        (tmp_path / "text.db").write_text("no database " * 100)
        with pytest.raises(ConfigError, match="a database file"):
            open_store(f"sqlite:{tmp_path / 'text.db'}", LIMITS)
        gc.collect()  # Python 3.13 warns of a connection that was left open

    def test_a_file_is_for_its_owner_alone(self, tmp_path: Path) -> None:
        open_store(f"sqlite:{tmp_path / 'x.db'}", LIMITS).close()
        assert (tmp_path / "x.db").stat().st_mode & 0o077 == 0

    def test_no_redis_there(self) -> None:
        with pytest.raises(ConfigError, match="an answer") as caught:
            open_store(f"redis://:secret@127.0.0.1:{free_port()}/0", LIMITS)
        assert "secret" not in str(caught.value)

    def test_a_redis_that_went_away(self, tmp_path: Path) -> None:
        with redis_server(tmp_path) as url:
            store = open_store(url, LIMITS)
            store.save(entry("a"))
        with pytest.raises(StoreUnavailable, match="does not answer"):
            store.load("a", 1000.0)
        store.close()


def test_a_store_in_a_file_goes_on_after_a_write_that_failed(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 's.db'}", LIMITS, key=None)
    when = "CREATE TRIGGER t BEFORE INSERT ON sessions WHEN NEW.id = 'bad'"
    store._connection.execute(f"{when} BEGIN SELECT RAISE(FAIL, 'x'); END")  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable):
        store.save(entry("bad"))
    assert store.save(entry("a"))
    store.close()


def test_what_is_saved_counts_among_what_its_owner_holds(make: Callable[[Limits], Store]) -> None:
    """Bob would hold most with it, so what he used longest ago goes, not Ann's."""
    store = make(LIMITS)
    store.save(entry("b", used=1000.0, size=300, owner="bob"))
    store.save(entry("a", used=1001.0, size=400))
    store.save(entry("b2", used=1002.0, size=310, owner="bob"))
    assert [len(store.owned(owner, 1003.0)) for owner in ("ann", "bob")] == [1, 1]
