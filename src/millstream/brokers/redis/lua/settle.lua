-- settle.lua: finish deliveries of one partition, but only while we still hold them.
-- KEYS     log, fence, due, note, dead, stats
-- ARGV     group, consumer, nonce, partition, max dead letters, then five per delivery: verdict, id, count, a, b
--            done                  it is finished
--            retry     a at ms     again at this time
--            postpone  a at ms     the same, but this attempt does not count; `postponed` grows by one
--            release   a at ms     handed back without having ended: does not count, 0 is at once
--            dead      a reason  b error
-- RETURNS  {OK, per delivery: 1 | 0 not ours any more | FULL | MORE too many bytes for one call | its error}
--          | {FENCED} | {TYPE, key of another kind}; nothing is written in these two cases
-- Why      XACK ignores who owns an entry, so a consumer that lost its place could finish another's work: the fence and,
--          per delivery, owner and delivery count are compared first. The count also makes a repeat harmless: a delivery
--          that was settled, and perhaps handed out again, shows another count.
--          A script is not a transaction: dead letters are added before anything else is written, so that maxmemory
--          refuses them with nothing done; each is acked only after it was stored. Then XACK of nothing opens the door
--          for ZADD and HSET, which maxmemory would refuse as a first write: a retry can always be stored.
--          A waiting entry belongs to `~due`, not to a consumer: consumers die, and their entries with them.
-- Notes    An end of the handler clears the note of a crash; handing back takes its `s` away, nothing runs any more.
--          The counter `+<id>` of postponements goes with the last outcome.
--          A dead letter is `reason error attempts position group died` and then the fields of the entry, whole, up to
--          3,500 pairs (Lua cannot pass more); of a body that was trimmed away only ours are left.
-- Cost     O(deliveries + bytes of dead letters); 100 retries 1.3 ms, 100 checked dones 0.7 ms
local log, fence, due, note, dead, stats = unpack(KEYS)
local group, consumer, nonce, partition, max_dead = unpack(ARGV, 1, 5)
local MAX_BYTES, MAX_WORDS = 1048576, 7000

if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
for i, kind in ipairs({'stream', 'string', 'zset', 'hash', 'stream', 'hash'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= 'none' and found ~= kind then return {'TYPE', KEYS[i]} end
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function held(id, count)
  local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
  return pending and pending[2] == consumer and pending[4] == tonumber(count)
end

local bytes, died, retried = 0, 0, 0

local function bury(id, count, reason, error)
  if redis.call('XLEN', dead) >= tonumber(max_dead) then return 'FULL' end
  if bytes > MAX_BYTES then return 'MORE' end
  local letter = {'XADD', dead, '*', 'reason', reason, 'error', error, 'attempts', count,
    'position', partition .. '@' .. id, 'group', group, 'died', now}
  local entry = redis.call('XRANGE', log, id, id)[1]
  for i, word in ipairs(entry and entry[2] or {}) do
    if i > MAX_WORDS then break end
    letter[#letter + 1] = word
    bytes = bytes + #word
  end
  local added = redis.pcall(unpack(letter))
  if type(added) == 'table' and added.err then return added.err end
  redis.call('XACK', log, group, id)
  redis.call('HDEL', note, id, '+' .. id)
  died = died + 1
  return 1
end

local function wait(id, at, ...)
  redis.call('XCLAIM', log, group, '~due', 0, id, 'JUSTID', ...)
  redis.call('ZADD', due, at, id)
end

local ends = {}
function ends.done(id)
  redis.call('XACK', log, group, id)
  redis.call('HDEL', note, id, '+' .. id)
end
function ends.retry(id, _, at)
  wait(id, at)
  redis.call('HDEL', note, id)
  retried = retried + 1
end
function ends.postpone(id, count, at)
  wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  redis.call('HDEL', note, id)
  redis.call('HINCRBY', note, '+' .. id, 1)
end
function ends.release(id, count, at)
  wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  local mark = redis.call('HGET', note, id)
  if mark and string.sub(mark, -1) == 's' then redis.call('HSET', note, id, string.sub(mark, 1, -2)) end
end

local results = {'OK'}
for i = 6, #ARGV, 5 do
  if ARGV[i] == 'dead' then
    local id, count = ARGV[i + 1], ARGV[i + 2]
    results[(i - 6) / 5 + 2] = held(id, count) and bury(id, count, ARGV[i + 3], ARGV[i + 4]) or 0
  end
end
redis.call('XACK', log, group, '0-1')
for i = 6, #ARGV, 5 do
  if ARGV[i] ~= 'dead' then
    local id, count = ARGV[i + 1], ARGV[i + 2]
    local ours = held(id, count)
    if ours then ends[ARGV[i]](id, count, ARGV[i + 3]) end
    results[(i - 6) / 5 + 2] = ours and 1 or 0
  end
end
if retried > 0 then redis.call('HINCRBY', stats, 'retried', retried) end
if died > 0 then redis.call('HINCRBY', stats, 'dead', died) end
return results
