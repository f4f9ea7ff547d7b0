-- replay.lua: give a dead letter back to its group, attempts counted anew.
-- KEYS     log, due, dead, stats, note
-- ARGV     group; letter: its id in `dead`; id: the event's
-- RETURNS  1 | 0: the letter is gone, or the event or the group is (then the letter stays)
-- Why      The event still lies in the log, so it becomes pending again, under `~due`, and other groups never notice. Where
--          it is pending already, or still undelivered (the group was made again, or sought back), it comes anyway: to
--          claim it would tear it out of somebody's hands, or deliver it twice.
--          FORCE makes a pending entry where there is none. Redis 6.2 would make one without a body too, so the body is
--          looked for first.
-- Cost     O(groups)
local log, due, dead, stats, note = unpack(KEYS)
local group, letter, id = unpack(ARGV)

local function before(a, b)
  local a_ms, a_seq = string.match(a, '(%d+)-(%d+)')
  local b_ms, b_seq = string.match(b, '(%d+)-(%d+)')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end

if #redis.call('XRANGE', dead, letter, letter) == 0 or #redis.call('XRANGE', log, id, id) == 0 then return 0 end
local delivered
for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
  local fields = {}
  for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
  if fields.name == group then delivered = fields['last-delivered-id'] end
end
if not delivered then return 0 end
redis.call('XACK', log, group, '0-1')
local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
if not before(delivered, id) and (not pending or pending[2] == '~due') then
  redis.call('XCLAIM', log, group, '~due', 0, id, 'RETRYCOUNT', 0, 'FORCE', 'JUSTID')
  redis.call('ZADD', due, 0, id)
  redis.call('HDEL', note, id, '+' .. id)
end
redis.call('XDEL', dead, letter)
redis.call('HINCRBY', stats, 'replayed', 1)
return 1
