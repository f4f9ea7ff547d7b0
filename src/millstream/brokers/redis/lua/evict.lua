-- evict.lua: take over what a silent consumer holds in one partition.
-- KEYS     log, fence (of the silent one), live, due, note, stats
-- ARGV     group, consumer, score: its tick as it was seen, or ''; limit; crashed: 1 or 0; lone: 1 or 0
-- RETURNS  {done | more, how many wait now} | {ALIVE}: it has beaten since
-- Why      The fence goes first and the entries move in the same step: in between, the silent one could wake up and finish
--          work that somebody else runs already. XGROUP DELCONSUMER throws pending entries away, so it is called in here,
--          and only when the look at them showed the last of them. Repeating is harmless: "a name without fence" is a
--          state, which the sweep finds too, not an event that must be caught.
-- Notes    After a crash: `ks` (started in k crashes before, and now) becomes `k+1`; nothing becomes `0`, or `1` where it
--          was alone (lone: this is the first call, and the partition is the whole unit). Without a crash the `s` goes.
--          What is left of a pack, `*<id>`, stays as it is.
-- Cost     O(limit)
local log, fence, live, due, note, stats = unpack(KEYS)
local group, consumer, score, limit, crashed, lone = unpack(ARGV)

local beat = redis.call('ZSCORE', live, consumer)
if beat and beat ~= score then return {'ALIVE'} end
redis.call('DEL', fence)
redis.call('XACK', log, group, '0-1')
local pending = redis.pcall('XPENDING', log, group, '-', '+', limit, consumer)
if pending.err then
  if string.find(pending.err, 'NOGROUP') then return {'done', 0} end
  return pending
end

local function blame(id)
  local mark = redis.call('HGET', note, id)
  if mark and string.sub(mark, -1) == 's' then
    local crashes = tonumber(string.sub(mark, 1, -2))
    redis.call('HSET', note, id, crashed == '1' and crashes + 1 or crashes)
  elseif not mark and crashed == '1' then
    redis.call('HSET', note, id, (lone == '1' and #pending == 1) and 1 or 0)
  end
end

local moved, lost = 0, 0
for _, entry in ipairs(pending) do
  local id = entry[1]
  if #redis.call('XCLAIM', log, group, '~due', 0, id, 'JUSTID') == 1 then
    redis.call('ZADD', due, 0, id)
    blame(id)
    moved = moved + 1
  else -- its body was trimmed away
    redis.call('XACK', log, group, id)
    redis.call('HDEL', note, id, '+' .. id, '*' .. id)
    lost = lost + 1
  end
end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
if #pending == tonumber(limit) then return {'more', moved} end
redis.call('XGROUP', 'DELCONSUMER', log, group, consumer)
return {'done', moved}
