-- repark.lua: let a group in the order of keys handle events of one partition once more: they join the ends of their keys.
-- USES     ids delivered
-- KEYS     log, lease, parked, parkinfo, then for each event the list of its key
-- ARGV     group, then for each event: event key; event, as it is parked
-- RETURNS  how many: not those that are parked or not settled yet, nor any where the group is gone
-- Why      The log has gone on, so what comes back comes behind what is parked of its key, see park.lua. Settled is what
--          the lease says: up to `w`, and up to `h` but for `open`. Where a person has moved the group's id behind `w`,
--          `acquire` will follow it, and all from there on comes again anyway.
--          What is parked comes anyway too; so a repeat of the same call gives nothing twice.
--          RPUSH goes first since maxmemory refuses it with nothing done: to give is not to store an outcome, it can wait.
-- Cost     O(groups + bytes of events + bytes parked of their keys)
local log, lease, parked, parkinfo = unpack(KEYS, 1, 4)
local group = ARGV[1]
local SLICE = 100

local at = delivered(log, group)
if not at then return 0 end
local known = redis.call('HMGET', lease, 'w', 'h', 'open')
local w, h, open = known[1], known[2] or '', known[3] or ''
if not w or before(at, w) then w, h, open = at, '', '' end
local unsettled = {}
for id in string.gmatch(open, '%S+') do unsettled[id] = true end

local function settled(id)
  return not before(w, id) or (h ~= '' and not before(h, id) and not unsettled[id])
end

local ids = {} -- per list, what is parked in it
local function parked_in(list)
  if not ids[list] then
    ids[list] = {}
    for first = 0, redis.call('LLEN', list) - 1, SLICE do
      for _, event in ipairs(redis.call('LRANGE', list, first, first + SLICE - 1)) do
        ids[list][string.match(event, '^%S+')] = true
      end
    end
  end
  return ids[list]
end

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local count = 0
for i = 2, #ARGV, 2 do
  local key, event, list = ARGV[i], ARGV[i + 1], KEYS[i / 2 + 4]
  local id = string.match(event, '^%S+')
  if settled(id) and not parked_in(list)[id] then
    redis.call('RPUSH', list, event)
    parked_in(list)[id] = true
    if redis.call('ZADD', parked, 'NX', 0, key) == 1 then
      redis.call('HSET', parkinfo, '=' .. key, '0 0 ' .. now .. ' ')
    end
    count = count + 1
  end
end
if count > 0 then redis.call('HINCRBY', parkinfo, '#n', count) end
return count
