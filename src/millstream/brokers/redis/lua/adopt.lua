-- adopt.lua: take over what a foreign consumer of our group has left lying.
-- KEYS     log, due, stats
-- ARGV     group, consumer, idle ms, limit
-- RETURNS  how many wait now
-- Why      Another client may read in our group and beats for nobody, so idle time is all there is. XAUTOCLAIM cannot do
--          this: it takes no consumer's name, and would take slow events of our own living consumers. XCLAIM compares
--          the idle time once more.
-- Cost     O(pending of that consumer)
local log, due, stats = unpack(KEYS)
local group, consumer, idle, limit = unpack(ARGV)
redis.call('XACK', log, group, '0-1')
local moved, lost = 0, 0
for _, entry in ipairs(redis.call('XPENDING', log, group, 'IDLE', idle, '-', '+', limit, consumer)) do
  local id = entry[1]
  if #redis.call('XCLAIM', log, group, '~due', idle, id, 'JUSTID') == 1 then
    redis.call('ZADD', due, 0, id)
    moved = moved + 1
  elseif #redis.call('XRANGE', log, id, id) == 0 then -- its body was trimmed away
    redis.call('XACK', log, group, id)
    lost = lost + 1
  end
end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
return moved
