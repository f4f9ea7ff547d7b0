-- replay.lua: give a dead letter back to its group, attempts counted anew.
-- USES     ids delivered again
-- KEYS     log, due, dead, stats, note
-- ARGV     group; letter: its id in `dead`; id: the event's, of one of a pack with its number: `1693-0.17`
-- RETURNS  1 | 0: the letter is gone, or the event or the group is (then the letter stays)
-- Why      The event still lies in the log, so it becomes pending again, under `~due`, and other groups never notice. Where
--          it is pending already, or still undelivered (the group was made again, or sought back), it comes anyway: to
--          claim it would tear it out of somebody's hands, or deliver it twice.
--          An event of a pack joins what is left of it; then `given` falls, for no event more is handled, see give.lua.
--          Redis 6.2 would make a pending entry without a body too, so the body is looked for first.
-- Cost     O(groups)
local log, due, dead, stats, note = unpack(KEYS)
local group, letter = ARGV[1], ARGV[2]
local id, part = entry_of(ARGV[3])

if #redis.call('XRANGE', dead, letter, letter) == 0 or #redis.call('XRANGE', log, id, id) == 0 then return 0 end
local last = delivered(log, group)
if not last then return 0 end
redis.call('XACK', log, group, '0-1')
local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
local waits = pending and pending[2] == '~due'
local more = not before(last, id) and (not pending or waits and not part)
if more then
  anew(log, group, due, note, id, part)
elseif part then
  if pending then rejoin(log, group, due, note, id, part, waits) end
  redis.call('HINCRBY', stats, 'given', -1)
end
redis.call('XDEL', dead, letter)
redis.call('HINCRBY', stats, 'replayed', 1)
return 1
