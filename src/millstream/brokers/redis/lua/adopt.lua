-- adopt.lua: take over what a foreign consumer of our group has left lying.
-- KEYS     log, due
-- ARGV     group, consumer, idle ms, limit
-- RETURNS  how many wait now
-- Why      Another client may read in our group and beats for nobody, so idle time is all there is. XAUTOCLAIM cannot do
--          this: it takes no consumer's name, and would take slow events of our own living consumers. XCLAIM compares
--          the idle time once more.
-- Cost     O(pending of that consumer)
local log, due = KEYS[1], KEYS[2]
local group, consumer, idle, limit = unpack(ARGV)
redis.call('XACK', log, group, '0-1')
local moved = 0
for _, entry in ipairs(redis.call('XPENDING', log, group, 'IDLE', idle, '-', '+', limit, consumer)) do
  for _, id in ipairs(redis.call('XCLAIM', log, group, '~due', idle, entry[1], 'JUSTID')) do
    redis.call('ZADD', due, 0, id)
    moved = moved + 1
  end
end
return moved
