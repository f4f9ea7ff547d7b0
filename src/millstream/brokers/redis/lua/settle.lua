-- settle.lua: finish deliveries of one partition, but only while we still hold them, each with what its handler published.
-- USES     store outputs
-- KEYS     log, fence, due, note, dead, stats, then those of the targets of outputs, see `store`
-- ARGV     group, consumer, nonce, partition, max dead letters, number of deliveries, outputs: '' or MessagePack, by the number
--          of their delivery, see `publish`; then five per delivery: verdict, id, count, a, b; then the blobs of the outputs
--            done                  it is finished
--            retry     a at ms     again at this time
--            postpone  a at ms     the same, but this attempt does not count; `postponed` grows by one
--            release   a at ms     handed back without having ended: does not count, 0 is at once
--            dead      a reason  b error
-- RETURNS  {OK, per delivery: 1 | 0 not ours any more | FULL | MORE too many bytes for one call | the error of its dead letter
--          | {why its outputs cannot be stored, which of them}}
--          | {FENCED} | {TYPE, key of another kind}; nothing is written in these two cases
-- Why      XACK ignores who owns an entry, so a consumer that lost its place could finish another's work: the fence and,
--          per delivery, owner and delivery count are compared first. The count also makes a repeat harmless: a delivery
--          that was settled, and perhaps handed out again, shows another count. So outputs are stored once, and none of
--          who was taken over.
--          A script is not a transaction: outputs and dead letters are added before anything else is written, so that
--          maxmemory refuses them with nothing done; each is acked only after it was stored. Then XACK of nothing opens the
--          door for ZADD and HSET, which maxmemory would refuse as a first write: a retry can always be stored.
--          A waiting entry belongs to `~due`, not to a consumer: consumers die, and their entries with them.
-- Notes    An end of the handler clears the note of a crash; handing back takes its `s` away, nothing runs any more.
--          The counter `+<id>` of postponements goes with the last outcome.
--          A dead letter is `reason error attempts position group died` and then the fields of the entry, whole, up to
--          3,500 pairs (Lua cannot pass more); of a body that was trimmed away only ours are left.
-- Cost     O(deliveries + outputs + bytes of dead letters); 100 retries 1.3 ms, 100 checked dones 0.4 ms, with an output each 0.8 ms
local log, fence, due, note, dead, stats = unpack(KEYS, 1, 6)
local group, consumer, nonce, partition, max_dead, deliveries, packed = unpack(ARGV, 1, 7)
local staged = packed == '' and {} or cmsgpack.unpack(packed)
local MAX_BYTES, MAX_WORDS, BLOBS = 1048576, 7000, 7 + 5 * deliveries

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

local bytes, died, retried, lost = 0, 0, 0, 0
local noted = redis.call('EXISTS', note) == 1

local function bury(id, count, reason, error)
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
  if #redis.call('XCLAIM', log, group, '~due', 0, id, 'JUSTID', ...) == 1 then
    redis.call('ZADD', due, at, id)
    return true
  else -- its body was trimmed away: there is nothing to try again
    redis.call('XACK', log, group, id)
    redis.call('HDEL', note, id, '+' .. id)
    lost = lost + 1
  end
end

local ends = {}
function ends.done(id)
  redis.call('XACK', log, group, id)
  if noted then redis.call('HDEL', note, id, '+' .. id) end
end
function ends.retry(id, _, at)
  wait(id, at)
  redis.call('HDEL', note, id)
  retried = retried + 1
end
function ends.postpone(id, count, at)
  local waits = wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  redis.call('HDEL', note, id)
  if waits then redis.call('HINCRBY', note, '+' .. id, 1) end
end
function ends.release(id, count, at)
  wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  local mark = redis.call('HGET', note, id)
  if mark and string.sub(mark, -1) == 's' then redis.call('HSET', note, id, string.sub(mark, 1, -2)) end
end

local function settle(verdict, id, count, a, b, outputs)
  if not held(id, count) then return 0 end
  if verdict == 'dead' and redis.call('XLEN', dead) >= tonumber(max_dead) then return 'FULL' end
  if verdict == 'dead' and bytes > MAX_BYTES then return 'MORE' end
  if outputs then
    local refused, which = publish(outputs, BLOBS)
    if refused then return {refused, which} end
  end
  if verdict == 'dead' then return bury(id, count, a, b) end
  ends[verdict](id, count, a)
  return 1
end

local results = {'OK'}
local function settle_those(large)
  for n = 1, deliveries do
    local first = 3 + 5 * n
    if large == (ARGV[first] == 'dead' or staged[n] ~= nil) then
      local verdict, id, count, a, b = unpack(ARGV, first, first + 4)
      results[n + 1] = settle(verdict, id, count, a, b, staged[n])
    end
  end
end
settle_those(true)
redis.call('XACK', log, group, '0-1')
settle_those(false)
if retried > 0 then redis.call('HINCRBY', stats, 'retried', retried) end
if died > 0 then redis.call('HINCRBY', stats, 'dead', died) end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
return results
