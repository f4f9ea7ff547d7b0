-- give.lua: let a group without order handle events of one partition once more, attempts counted anew.
-- USES     ids delivered
-- KEYS     log, due, stats, note
-- ARGV     group, then ids
-- RETURNS  how many: not those that are gone, pending, or still undelivered, nor any where the group is gone
-- Why      The event still lies in the log, so it becomes pending again, under `~due`, and other groups never notice. What
--          is pending or undelivered comes anyway, see replay.lua; so a repeat of the same call gives nothing twice.
--          ZADD goes first since maxmemory refuses it with nothing done: to give is not to store an outcome, it can wait.
--          What is done is counted as what was read less what was given up: `given` makes up for what is handled again.
-- Cost     O(groups + ids + bytes of bodies)
local log, due, stats, note = unpack(KEYS)
local group = ARGV[1]
local last = delivered(log, group)
if not last then return 0 end
local count = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local settled = not before(last, id) and #redis.call('XPENDING', log, group, id, id, 1) == 0
  if settled and #redis.call('XRANGE', log, id, id) > 0 then
    redis.call('ZADD', due, 0, id)
    redis.call('XCLAIM', log, group, '~due', 0, id, 'RETRYCOUNT', 0, 'FORCE', 'JUSTID')
    redis.call('HDEL', note, id, '+' .. id)
    count = count + 1
  end
end
if count > 0 then redis.call('HINCRBY', stats, 'given', count) end
return count
