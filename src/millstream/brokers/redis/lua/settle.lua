-- settle.lua: finish deliveries of one partition, but only while we still hold them, each with what its handler published.
-- USES     store outputs letter parts
-- KEYS     log, fence, due, note, dead, stats, then those of the targets of outputs, see `store`
-- ARGV     group, consumer, nonce, partition, max dead letters, number of deliveries, outputs and letters: '', or one or two
--          times MessagePack, by the number of their delivery; then five per delivery: verdict, id, count, a, b; then blobs
--            done                  it is finished
--            retry     a at ms     b left      again at this time
--            postpone  a at ms     b left      the same, but this attempt does not count; `postponed` grows by one
--            release   a at ms     handed back without having ended: does not count, 0 is at once
--            dead      a reason    b error
--          left: of a pack which events are to be tried again, `0,3`; '' for all that were handed out
--          outputs: see `publish`; letters: events of a pack that are given up, each {its number, reason, error, first blob, how
--          many blobs: its fields}
-- RETURNS  {OK, per delivery: 1 | 0 not ours any more | FULL | MORE too many bytes for one call | the error of a dead letter
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
--          The counter `+<id>` of postponements, and what is left of a pack, `*<id>`, go with the last outcome.
--          A dead letter is the entry, whole; of a body that was trimmed away only our own fields are left. The letters of one
--          pack are stored with its outcome, or the pack stays as it is. What was given back of it while it was at work waits
--          when the rest is finished. `given` makes up for letters of which the pack is done, see give.lua.
-- Cost     O(deliveries + outputs + bytes of dead letters), 100 retries 1.3 ms, 100 checked dones 0.4 ms, with an output each
--          0.8 ms; 512 letters of a pack 6 ms, and it has 4,096 at most
local log, fence, due, note, dead, stats = unpack(KEYS, 1, 6)
local group, consumer, nonce, partition, max_dead, deliveries, packed = unpack(ARGV, 1, 7)
local staged, dying = {}, {}
if packed ~= '' then staged, dying = cmsgpack.unpack(packed) end
dying = dying or {}
local MAX_BYTES, BLOBS = 1048576, 7 + 5 * deliveries

if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
for i, kind in ipairs({'stream', 'string', 'zset', 'hash', 'stream', 'hash'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= 'none' and found ~= kind then return {'TYPE', KEYS[i]} end
end

local function held(id, count)
  local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
  return pending and pending[2] == consumer and pending[4] == tonumber(count)
end

local bytes, died, retried, lost, parts = 0, 0, 0, 0, 0
local noted = redis.call('EXISTS', note) == 1

local function forget(id) redis.call('HDEL', note, id, '+' .. id, '*' .. id) end

local function bury(id, count, reason, error, words)
  local refused = letter(dead, group, partition .. '@' .. id, count, reason, error, words)
  if refused then return refused end
  for _, word in ipairs(words) do bytes = bytes + #word end
  died = died + 1
end

local function bury_parts(id, count, letters)
  for _, given_up in ipairs(letters) do
    local part, reason, error, first, many = unpack(given_up)
    local words = {unpack(ARGV, BLOBS + first, BLOBS + first + many - 1)}
    local refused = bury(id .. '.' .. part, count, reason, error, words)
    if refused then return refused end
    parts = parts + 1
  end
end

local function wait(id, at, ...)
  if #redis.call('XCLAIM', log, group, '~due', 0, id, 'JUSTID', ...) == 1 then
    redis.call('ZADD', due, at, id)
    return true
  else -- its body was trimmed away: there is nothing to try again
    redis.call('XACK', log, group, id)
    forget(id)
    lost = lost + 1
  end
end

local function leave(id, left)
  if left == '' then return end -- what was handed out is noted, and what was given back since then
  local more = rejoined(note, id)
  redis.call('HSET', note, '*' .. id, more and left .. ',' .. more or left)
end

local ends = {}
function ends.done(id)
  local more = noted and rejoined(note, id)
  if more then
    local waits = wait(id, 0, 'RETRYCOUNT', 0)
    forget(id)
    if waits then redis.call('HSET', note, '*' .. id, more) end
  else
    redis.call('XACK', log, group, id)
    if noted then forget(id) end
  end
end
function ends.dead(id, count, reason, error)
  local entry = redis.call('XRANGE', log, id, id)[1]
  local refused = bury(id, count, reason, error, entry and entry[2] or {})
  if refused then return refused end
  redis.call('XACK', log, group, id)
  forget(id)
end
function ends.retry(id, _, at, left)
  if wait(id, at) then leave(id, left) end
  redis.call('HDEL', note, id)
  retried = retried + 1
end
function ends.postpone(id, count, at, left)
  local waits = wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  redis.call('HDEL', note, id)
  if not waits then return end
  leave(id, left)
  redis.call('HINCRBY', note, '+' .. id, 1)
end
function ends.release(id, count, at)
  wait(id, at, 'RETRYCOUNT', math.max(count - 1, 0))
  local mark = redis.call('HGET', note, id)
  if mark and string.sub(mark, -1) == 's' then redis.call('HSET', note, id, string.sub(mark, 1, -2)) end
end

local function settle(verdict, id, count, a, b, outputs, letters)
  if not held(id, count) then return 0 end
  local deaths = (verdict == 'dead' and 1 or 0) + (letters and #letters or 0)
  if deaths > 0 and redis.call('XLEN', dead) + deaths > tonumber(max_dead) then return 'FULL' end
  if deaths > 0 and bytes > MAX_BYTES then return 'MORE' end
  if outputs then
    local refused, which = publish(outputs, BLOBS)
    if refused then return {refused, which} end
  end
  return letters and bury_parts(id, count, letters) or ends[verdict](id, count, a, b) or 1
end

local results = {'OK'}
local function settle_those(large)
  for n = 1, deliveries do
    local first = 3 + 5 * n
    local outputs, letters = staged[n], dying[n]
    if large == (ARGV[first] == 'dead' or outputs ~= nil or letters ~= nil) then
      local verdict, id, count, a, b = unpack(ARGV, first, first + 4)
      results[n + 1] = settle(verdict, id, count, a, b, outputs, letters)
    end
  end
end
settle_those(true)
redis.call('XACK', log, group, '0-1')
settle_those(false)
if retried > 0 then redis.call('HINCRBY', stats, 'retried', retried) end
if died > 0 then redis.call('HINCRBY', stats, 'dead', died) end
if parts > 0 then redis.call('HINCRBY', stats, 'given', parts) end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
return results
