-- give.lua: let a group without order handle events of one partition once more, attempts counted anew.
-- USES     ids delivered again
-- KEYS     log, due, stats, note
-- ARGV     group, then ids, of an event of a pack with its number: `1693-0.17`
-- RETURNS  how many: not those that are gone, pending, or still undelivered, nor any where the group is gone
-- Why      The event still lies in the log, so it becomes pending again, under `~due`, and other groups never notice. What
--          is pending or undelivered comes anyway, see replay.lua; so a repeat of the same call gives nothing twice.
--          Maxmemory may refuse the first write, with nothing done: to give is not to store an outcome, it can wait.
--          What is done is counted as what was read less what was given up: `given` makes up for what is handled again.
--          What joins others of its pack that are left adds nothing to what is handled.
-- Cost     O(groups + ids + bytes of bodies)
local log, due, stats, note = unpack(KEYS)
local group = ARGV[1]
local last = delivered(log, group)
if not last then return 0 end
local count, given = 0, 0
for i = 2, #ARGV do
  local id, part = entry_of(ARGV[i])
  local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
  if not before(last, id) and not pending and #redis.call('XRANGE', log, id, id) > 0 then
    anew(log, group, due, note, id, part)
    count, given = count + 1, given + 1
  elseif part and pending and rejoin(log, group, due, note, id, part, pending[2] == '~due') then
    count = count + 1
  end
end
if given > 0 then redis.call('HINCRBY', stats, 'given', given) end
return count
