-- store.lua: put one record into a partition, as the policy of its stream says.
-- KEYS     six from `first` on: log, later, ids0, ids1, ids2, meta; and, anywhere, the logs of a stream with a ceiling
-- CALL     store(first, policy, fields, due, checked, admitted)
--            policy   dedupe_ms, dedupe_ids; ceiling: events with which the stream is full; weighed: 1 when the ceiling is
--                     a size, `full_at` of meta says how many events that is; logs, parts: where in KEYS the logs of all its
--                     partitions begin, and how many they are. Numbers, also as text; 0: not asked for
--            fields   the seven values of an entry, in its order: id, type, source, time, subject, headers, data
--            due      milliseconds: kept aside until then when that is ahead; nil, '' or past: stored at once
--            checked  true: its id is neither looked up nor remembered
--            admitted true: `room` has let it in, so nothing but maxmemory refuses it
-- RETURNS  the offset; of an id that is remembered the first one's, which may be `later` | 'later': kept aside
--          | {err = …}: OOM …; FULL ids; FULL events; FULL bytes; WRONGTYPE …: nothing was written for this record
-- ALSO     policy_at(n): the policy whose six numbers begin at ARGV[n], in this order
--          room(first, policy, id, due, checked, more): why a record could not be stored now, as {err = …}, or nil. Writes
--          nothing: for records that are stored together, or not at all
-- Why      Ids are remembered in three hashes that are used in turn, each for half a window of the server's time and then
--          for a whole one: an id is known for a window at least, and for one and a half at most. Deleting single ids would
--          need a second index. The field without a name says when a hash was begun, so a window that grows, or a clock that
--          goes back, forgets nothing too early. A window that shrinks forgets at once what lies in a hash older than one and
--          a half of the new one, however young the id. Expiry frees the ids of an idle stream; it comes late, since UNLINK
--          of a large hash stops nobody, and expiry does.
--          XADD comes first: maxmemory refuses it as the first write of a script, and then nothing was written; what
--          follows a write is let through. A repeat writes too, it is counted: else WAIT after it would confirm nothing.
--          Where even that is refused PEXPIRE, which never is, opens the door.
--          What is kept aside is not in the log: the ceiling stops it when it falls due.
--          Members of `later` are unique: a counter, then the record. So equal due times keep the order of publishing.
-- Cost     O(1) a record, with a ceiling O(partitions) a call; about 120 bytes for each id that is remembered
local store, room

local function policy_at(n)
  return {dedupe_ms = ARGV[n], dedupe_ids = ARGV[n + 1], ceiling = ARGV[n + 2], weighed = ARGV[n + 3],
    logs = ARGV[n + 4], parts = ARGV[n + 5]}
end

do
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local targets = {}
  local lengths = {} -- events of a stream, by where its logs begin

  local function met(first, policy) -- once per script and target, before anything is written there
    local log, later, meta = KEYS[first], KEYS[first + 1], KEYS[first + 5]
    local half = math.ceil((tonumber(policy.dedupe_ms) or 0) / 2)
    local target = {log = log, later = later, meta = meta, half = half, hashes = {}, ids = 0}
    for i, kind in ipairs({'stream', 'zset', 'hash', 'hash', 'hash', 'hash'}) do
      local key = KEYS[first + i - 1]
      local found = redis.call('TYPE', key).ok
      if found ~= 'none' and found ~= kind then target.wrong = {err = 'WRONGTYPE ' .. key .. ' holds a ' .. found} end
    end
    for i = first + 2, first + (half > 0 and not target.wrong and 4 or 0) do
      local hash = {key = KEYS[i], begun = tonumber(redis.call('HGET', KEYS[i], '') or nil)}
      if hash.begun and now - hash.begun >= 3 * half then hash.begun = nil end
      if hash.begun then target.ids = target.ids + redis.call('HLEN', hash.key) - 1 end
      target.hashes[#target.hashes + 1] = hash
    end
    target.max_ids = tonumber(policy.dedupe_ids) or 0
    target.ceiling, target.logs, target.parts = tonumber(policy.ceiling), tonumber(policy.logs), tonumber(policy.parts)
    if (tonumber(policy.weighed) or 0) > 0 and not target.wrong then
      target.full_at = tonumber(redis.call('HGET', meta, 'full_at') or nil)
    end
    targets[first] = target
    return target
  end

  local function ahead(due)
    due = tonumber(due)
    return due and due > now and due or nil
  end

  local function remembered(target, id)
    for _, hash in ipairs(target.hashes) do
      local offset = hash.begun and redis.call('HGET', hash.key, id)
      if offset then return offset, hash end
    end
  end

  local function repeated(target, hash)
    local counted = redis.pcall('HINCRBY', target.meta, 'repeats', 1)
    if type(counted) == 'table' and counted.err then
      redis.call('PEXPIRE', hash.key, string.format('%.0f', 4 * target.half))
      redis.call('HINCRBY', target.meta, 'repeats', 1)
    end
  end

  local function length(target)
    local logs = target.logs
    if not lengths[logs] then
      lengths[logs] = 0
      for i = logs, logs + target.parts - 1 do lengths[logs] = lengths[logs] + redis.call('XLEN', KEYS[i]) end
    end
    return lengths[logs]
  end

  local function full(target, looks, aside, more)
    if looks and target.max_ids > 0 and target.ids >= target.max_ids then return {err = 'FULL ids'} end
    if aside or target.ceiling <= 0 and not target.full_at then return end
    local events = length(target) + (more or 0)
    if target.ceiling > 0 and events >= target.ceiling then return {err = 'FULL events'} end
    if target.full_at and events >= target.full_at then return {err = 'FULL bytes'} end
  end

  local function put(target, fields, aside)
    if not aside then
      local counted = lengths[target.logs]
      if counted then lengths[target.logs] = counted + 1 end -- one too many where XADD is refused: then all is over
      return redis.pcall('XADD', target.log, '*', 'id', fields[1], 'type', fields[2], 'source', fields[3],
        'time', fields[4], 'subject', fields[5], 'headers', fields[6], 'data', fields[7])
    end
    local number = redis.pcall('HINCRBY', target.meta, 'put_aside', 1)
    if type(number) == 'table' then return number end
    redis.call('ZADD', target.later, aside, string.format('%016.0f', number) .. cmsgpack.pack(fields))
    return 'later'
  end

  local function remember(target, id, offset)
    local newest, oldest
    for _, hash in ipairs(target.hashes) do
      if hash.begun and (not newest or hash.begun > newest.begun) then newest = hash end
      if not oldest or (hash.begun or 0) < (oldest.begun or 0) then oldest = hash end
    end
    if not newest or now - newest.begun >= target.half then
      newest = oldest
      newest.begun = now
      redis.call('UNLINK', newest.key)
      redis.call('HSET', newest.key, '', string.format('%.0f', now))
    end
    redis.call('HSET', newest.key, id, offset)
    if not newest.lasts and redis.call('PTTL', newest.key) < 3 * target.half then -- it is new, or the window has grown
      redis.call('PEXPIRE', newest.key, string.format('%.0f', 4 * target.half))
    end
    newest.lasts = true
    target.ids = target.ids + 1
  end

  function room(first, policy, id, due, checked, more)
    local target = targets[first] or met(first, policy)
    if target.wrong then return target.wrong end
    local looks = target.half > 0 and id ~= '' and not checked
    if not (looks and remembered(target, id)) then return full(target, looks, ahead(due), more) end
  end

  function store(first, policy, fields, due, checked, admitted)
    local target = targets[first] or met(first, policy)
    if target.wrong then return target.wrong end
    local id = fields[1]
    local looks = target.half > 0 and id ~= '' and not checked
    if looks then
      local offset, hash = remembered(target, id)
      if offset then
        repeated(target, hash)
        return offset
      end
    end
    local aside = ahead(due)
    local offset = not admitted and full(target, looks, aside) or put(target, fields, aside)
    if looks and type(offset) == 'string' then remember(target, id, offset) end
    return offset
  end
end
