"""Sessions in a Redis: servers that share it can take over each other's conversations.

    synapse:{sessions}:data:ID     hash: version, created, data; expires by itself
    synapse:{sessions}:about       hash: ID -> owner, tokens, size, as JSON
    synapse:{sessions}:used        sorted set: ID by time of use
    synapse:{sessions}:owner:NAME  set: the owner's IDs
    synapse:{sessions}:bytes       their bytes together

Scripts run inside Redis, one at a time, so that every call is atomic whoever else is at work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving.stores.base import Entry, Limits, StoreUnavailable, Summary
from synapse_arch.errors import ConfigError, explain

PREFIX = "synapse:{sessions}:"
# ARGV: prefix, now, ttl, most_bytes, most_owned, then a script's own.
COMMON = """
local prefix, now, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local function drop(id)
    local about = redis.call('HGET', prefix .. 'about', id)
    if not about then return 0 end
    about = cjson.decode(about)
    redis.call('HDEL', prefix .. 'about', id)
    redis.call('ZREM', prefix .. 'used', id)
    redis.call('SREM', prefix .. 'owner:' .. about.owner, id)
    redis.call('DECRBY', prefix .. 'bytes', about.size)
    redis.call('DEL', prefix .. 'data:' .. id)
    return 1
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'used', '-inf', '(' .. string.format('%.6f', now - ttl))) do
    drop(id)
end
local function touch(id)
    redis.call('ZADD', prefix .. 'used', now, id)
    redis.call('PEXPIRE', prefix .. 'data:' .. id, math.ceil(ttl * 1000))
end
"""
LOAD = """
local id = ARGV[6]
local about = redis.call('HGET', prefix .. 'about', id)
if not about or redis.call('EXISTS', prefix .. 'data:' .. id) == 0 then return false end
touch(id)
local kept = redis.call('HMGET', prefix .. 'data:' .. id, 'version', 'created', 'data')
return {about, kept[1], kept[2], kept[3]}
"""
SAVE = """
local id, version, created, about, data = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local kept = tonumber(redis.call('HGET', prefix .. 'data:' .. id, 'version') or 0)
if version ~= kept + 1 then return 0 end
drop(id)
local owner, size = cjson.decode(about).owner, #data
local names = redis.call('SMEMBERS', prefix .. 'owner:' .. owner)
if #names >= tonumber(ARGV[5]) then
    local age = {}
    for _, name in ipairs(names) do age[name] = tonumber(redis.call('ZSCORE', prefix .. 'used', name)) end
    table.sort(names, function(a, b) return age[a] < age[b] end)
    for n = 1, #names + 1 - tonumber(ARGV[5]) do drop(names[n]) end
end
if tonumber(redis.call('GET', prefix .. 'bytes') or 0) + size > tonumber(ARGV[4]) then
    local held, kept_now = {[owner] = size}, {}
    for n, name in ipairs(redis.call('ZRANGE', prefix .. 'used', 0, -1)) do
        local one = cjson.decode(redis.call('HGET', prefix .. 'about', name))
        held[one.owner] = (held[one.owner] or 0) + one.size
        kept_now[n] = {name, one.owner, one.size}
    end
    while #kept_now > 0 and tonumber(redis.call('GET', prefix .. 'bytes')) + size > tonumber(ARGV[4]) do
        local most = 1
        for n, one in ipairs(kept_now) do
            if held[one[2]] > held[kept_now[most][2]] then most = n end
        end
        local name, its_owner, its_size = unpack(table.remove(kept_now, most))
        held[its_owner] = held[its_owner] - its_size
        drop(name)
    end
end
redis.call('HSET', prefix .. 'data:' .. id, 'version', version, 'created', created, 'data', data)
redis.call('HSET', prefix .. 'about', id, about)
redis.call('SADD', prefix .. 'owner:' .. owner, id)
redis.call('INCRBY', prefix .. 'bytes', size)
touch(id)
return 1
"""
DELETE = "return drop(ARGV[6])"
OWNED = """
local found = {}
for _, id in ipairs(redis.call('SMEMBERS', prefix .. 'owner:' .. ARGV[6])) do
    local kept = redis.call('HMGET', prefix .. 'data:' .. id, 'version', 'created')
    if kept[1] then
        local row = {id, redis.call('HGET', prefix .. 'about', id), kept[1], kept[2]}
        row[5] = redis.call('ZSCORE', prefix .. 'used', id)
        found[#found + 1] = row
    end
end
return found
"""
USAGE = "return {redis.call('HLEN', prefix .. 'about'), redis.call('GET', prefix .. 'bytes') or '0'}"


class RedisStore:
    """Hashes in a Redis.

    Args:
        url: redis://[:PASSWORD@]HOST:PORT/DB, or rediss:// for TLS.
        limits: how much is kept; servers that share a Redis should have the same.

    Raises:
        ConfigError: the client is not installed, or nothing answers there.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        try:
            import redis
        except ModuleNotFoundError as error:
            remedy = "pip install 'synapse-arch[redis]'"
            raise ConfigError(explain("--session-store redis", "the redis package", "not installed", remedy)) from error
        self._error: type[Exception] = redis.RedisError
        self._limits = limits
        try:
            self._client: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            place = url.rpartition("@")[2]  # without the password
            remedy = "start it, or correct the address"
            raise ConfigError(
                explain(f"--session-store redis at {place}", "an answer", type(error).__name__, remedy)
            ) from error
        scripts = {"load": LOAD, "save": SAVE, "delete": DELETE, "owned": OWNED, "usage": USAGE}
        self._scripts = {name: self._client.register_script(COMMON + body) for name, body in scripts.items()}

    def load(self, session: str, now: float) -> Entry | None:
        """See `Store`."""
        row = self._run("load", now, session)
        if not row:
            return None
        about = json.loads(row[0])
        return Entry(session, about["owner"], int(row[1]), about["tokens"], float(row[2]), now, row[3])

    def save(self, entry: Entry) -> bool:
        """See `Store`."""
        about = json.dumps({"owner": entry.owner, "tokens": entry.tokens, "size": len(entry.data)})
        kept = self._run("save", entry.used, entry.id, entry.version, repr(entry.created), about, entry.data)
        return bool(kept)

    def delete(self, session: str) -> bool:
        """See `Store`."""
        return bool(self._run("delete", 0.0, session))

    def owned(self, owner: str, now: float) -> list[Summary]:
        """See `Store`."""
        found = []
        for name, raw, version, created, used in self._run("owned", now, owner):
            about = json.loads(raw)
            times = float(created), float(used)
            found.append(Summary(name.decode(), owner, int(version), about["tokens"], about["size"], *times))
        return sorted(found, key=lambda summary: (-summary.used, summary.id))

    def usage(self, now: float) -> tuple[int, int]:
        """See `Store`."""
        count, size = self._run("usage", now)
        return int(count), int(size)

    def close(self) -> None:
        """See `Store`."""
        self._client.close()

    def _run(self, script: str, now: float, *arguments: str | int | bytes) -> Any:
        limits = (repr(self._limits.ttl), self._limits.most_bytes, self._limits.most_owned)
        with self._answering():
            return self._scripts[script](keys=[f"{PREFIX}about"], args=[PREFIX, repr(now), *limits, *arguments])

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreUnavailable(f"the session store does not answer: {type(error).__name__}") from error
