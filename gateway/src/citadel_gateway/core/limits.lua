-- One user's limits, as core/limitstore.py keeps them in memory; there it is said what they mean.
--
-- KEYS  1 holds (hash: worker -> "number delta_number requests tokens slots spare_requests spare_tokens spare_slots")
--       2 slots of the window (sorted set)       3 what is in them (hash: r<slot>, t<slot>, and the sums R and T)
--       4 days and months (hash: d<day>, m<month>)       5 when each worker was last heard of (hash, ms)
-- ARGV  1 "sync", "beat", "lost", "usage" or "probe"   2 worker   3 now in ms, empty: the server's clock (tests give one)
--   sync  4 number   5 delta_number   6-10 the five limits (0: none)   11 1: a spent quota blocks
--         12-14 opened   15-17 keep   18-20 want   21 number of asks   22- tokens of each
--         then three for each delta: its age in ms, requests, tokens
--   lost  4 ms since the epoch   5 tokens;  KEYS[6] says that it was counted before
local DEAD, FORGOTTEN, WINDOW, CAUTION, NEVER = 5000, 3600000, 601, 8, 1e12
local mode, worker, now = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Number of the day and of the month, and the milliseconds until they end.
local function calendar(ms)
  local day = math.floor(ms / 86400000)
  local function month_of(days) -- the civil calendar from the number of days since 1970
    local z = days + 719468
    local era = math.floor(z / 146097)
    local doe = z - era * 146097
    local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
    local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
    local mp = math.floor((5 * doy + 2) / 153)
    local month = mp < 10 and mp + 2 or mp - 10
    return (yoe + era * 400 + (month <= 1 and 1 or 0)) * 12 + month
  end
  local month = month_of(day)
  local first = day + 1
  while month_of(first) == month do first = first + 1 end
  return day, month, (day + 1) * 86400000 - ms, first * 86400000 - ms
end

local function spend(ms, tokens)
  local day, month = calendar(ms)
  for _, field in ipairs({'d' .. day, 'm' .. month}) do
    if redis.call('HINCRBY', KEYS[4], field, tokens) == tokens then -- a new day: those before are over
      for _, old in ipairs(redis.call('HKEYS', KEYS[4])) do
        local kind, number = string.sub(old, 1, 1), tonumber(string.sub(old, 2))
        if (kind == 'd' and number < day - 1) or (kind == 'm' and number < month - 1) then
          redis.call('HDEL', KEYS[4], old)
        end
      end
    end
  end
  redis.call('PEXPIRE', KEYS[4], 40 * 86400000)
end

local function add(slot, requests, tokens)
  if requests > 0 then
    redis.call('HINCRBY', KEYS[3], 'r' .. slot, requests)
    redis.call('HINCRBY', KEYS[3], 'R', requests)
  end
  if tokens > 0 then
    redis.call('HINCRBY', KEYS[3], 't' .. slot, tokens)
    redis.call('HINCRBY', KEYS[3], 'T', tokens)
  end
  redis.call('ZADD', KEYS[2], slot, slot)
end

-- The window's own time never goes back: when the server's clock is set back, `skew` makes up for it.
local function window_time()
  local found = redis.call('HMGET', KEYS[3], 'skew', 'last')
  local skew, last = tonumber(found[1]) or 0, tonumber(found[2]) or 0
  if now + skew < last then
    skew = last - now
    redis.call('HSET', KEYS[3], 'skew', skew)
  end
  redis.call('HSET', KEYS[3], 'last', now + skew)
  return now + skew
end

local function keep_window()
  redis.call('PEXPIRE', KEYS[2], 120000)
  redis.call('PEXPIRE', KEYS[3], 120000)
end

if mode == 'probe' then -- can it be written to?
  redis.call('HSET', KEYS[5], '', now)
  return redis.call('HDEL', KEYS[5], '')
end
if mode == 'lost' then
  if not redis.call('SET', KEYS[6], 1, 'NX', 'PX', 86400000) then return 0 end
  local tokens, at = tonumber(ARGV[5]), tonumber(ARGV[4])
  local time = window_time()
  local age = math.max(0, now - at)
  if age < 60000 then add(math.floor((time - age) / 100), 0, tokens) end
  if tokens > 0 then spend(math.min(at, now), tokens) end
  keep_window()
  return 1
end

-- Who is alive. After the clock was set back, everybody has five seconds to be heard of again.
local beats, alive, known, workers, mine = redis.call('HGETALL', KEYS[5]), {}, {}, 1, nil
for i = 1, #beats, 2 do
  local name, age = beats[i], now - beats[i + 1]
  if name == worker then
    mine = age
  else
    if age < -DEAD then
      redis.call('HSET', KEYS[5], name, now)
      age = 0
    end
    if age < DEAD then
      alive[name] = true
      workers = workers + 1
    elseif age > FORGOTTEN then
      redis.call('HDEL', KEYS[5], name)
    end
    known[name] = age <= FORGOTTEN
  end
end
if mode ~= 'usage' and (not mine or mine > 500 or mine < 0) then
  redis.call('HSET', KEYS[5], worker, now)
  redis.call('PEXPIRE', KEYS[5], 2 * FORGOTTEN)
end
if mode == 'beat' then return workers end

local function three(first) return tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2]) end

-- What all workers hold.
local number, delta_number = tonumber(ARGV[4]), 0 -- none for "usage"
local held_r, held_t, held_c, spare_r, spare_t, spare_c = 0, 0, 0, 0, 0, 0
local soon_r, soon_t, soon_c = 0, 0, 0 -- held by workers with something to spare, who tell us at their next tick only
local holds = redis.call('HGETALL', KEYS[1])
for i = 1, #holds, 2 do
  local a, b, r, t, c, sr, st, sc =
    string.match(holds[i + 1], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
  if holds[i] == worker then
    if tonumber(a) >= number then return 0 end
    delta_number = tonumber(b)
  elseif alive[holds[i]] then
    held_r, held_t, held_c = held_r + r, held_t + t, held_c + c
    spare_r, spare_t, spare_c = spare_r + sr, spare_t + st, spare_c + sc
    if sr + st + sc > 0 then
      soon_r, soon_t, soon_c = soon_r + r, soon_t + t, soon_c + c
    end
  elseif not known[holds[i]] then
    redis.call('HDEL', KEYS[1], holds[i])
  end
end

if mode == 'usage' then -- what is to spare is not used
  local sums = redis.call('HMGET', KEYS[3], 'R', 'T', 'skew')
  local r, t = tonumber(sums[1]) or 0, tonumber(sums[2]) or 0
  local slot = math.floor((now + (tonumber(sums[3]) or 0)) / 100)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', slot - WINDOW)) do
    local gone = redis.call('HMGET', KEYS[3], 'r' .. name, 't' .. name)
    r, t = r - (tonumber(gone[1]) or 0), t - (tonumber(gone[2]) or 0)
  end
  local day, month = calendar(now)
  local spent = redis.call('HMGET', KEYS[4], 'd' .. day, 'm' .. month)
  return {
    r + held_r - spare_r, t + held_t - spare_t, held_c - spare_c, tonumber(spent[1]) or 0, tonumber(spent[2]) or 0
  }
end

-- What was used: forget what is older than a minute, add what is new.
local time = window_time()
local slot = math.floor(time / 100)
local old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', slot - WINDOW)
if #old > 0 then
  local fields = {}
  for i, name in ipairs(old) do
    fields[2 * i - 1], fields[2 * i] = 'r' .. name, 't' .. name
  end
  local r, t = 0, 0
  for i, value in ipairs(redis.call('HMGET', KEYS[3], unpack(fields))) do
    if i % 2 == 1 then r = r + (tonumber(value) or 0) else t = t + (tonumber(value) or 0) end
  end
  redis.call('HDEL', KEYS[3], unpack(fields))
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', slot - WINDOW)
  if r > 0 then redis.call('HINCRBY', KEYS[3], 'R', -r) end
  if t > 0 then redis.call('HINCRBY', KEYS[3], 'T', -t) end
end
local asks = tonumber(ARGV[21])
if tonumber(ARGV[5]) > delta_number then
  delta_number = tonumber(ARGV[5])
  for i = 22 + asks, #ARGV, 3 do
    local age, requests, tokens = three(i)
    local where = math.floor((time - age) / 100)
    if where > slot - WINDOW then add(where, requests, tokens) end
    if tokens > 0 then spend(now - age, tokens) end
  end
end

-- What is left.
local function limit(index)
  local value = tonumber(ARGV[index])
  return value > 0 and value or NEVER
end
local open_r, open_t, open_c = three(12)
local keep_r, keep_t, keep_c = three(15)
local want_r, want_t, want_c = three(18)
local sums = redis.call('HMGET', KEYS[3], 'R', 'T')
local left_r = limit(6) - (tonumber(sums[1]) or 0) - held_r - open_r - keep_r
local left_t = limit(7) - (tonumber(sums[2]) or 0) - held_t - open_t - keep_t
local left_c = limit(8) - held_c - open_c - keep_c
local left_d, left_m, day_end, month_end = NEVER, NEVER, 0, 0
if limit(9) < NEVER or limit(10) < NEVER then
  local day, month
  day, month, day_end, month_end = calendar(now)
  local spent = redis.call('HMGET', KEYS[4], 'd' .. day, 'm' .. month)
  left_d = limit(9) - (tonumber(spent[1]) or 0) - held_t - open_t - keep_t
  left_m = limit(10) - (tonumber(spent[2]) or 0) - held_t - open_t - keep_t
end
local block = ARGV[11] == '1'

-- When the window will have let go of enough; -1: not before running requests have ended. Read in parts, only if asked.
local window = {next = 0, done = false}
local function entry(index)
  while not window[index] and not window.done do
    local names = redis.call('ZRANGE', KEYS[2], window.next, window.next + 63)
    window.next = window.next + #names
    window.done = #names < 64
    if #names > 0 then
      local fields = {}
      for i, name in ipairs(names) do
        fields[2 * i - 1], fields[2 * i] = 'r' .. name, 't' .. name
      end
      local found = redis.call('HMGET', KEYS[3], unpack(fields))
      for i, name in ipairs(names) do
        window[#window + 1] = {
          (name + WINDOW) * 100 - time, tonumber(found[2 * i - 1]) or 0, tonumber(found[2 * i]) or 0
        }
      end
    end
  end
  return window[index]
end
local function slide(column, need)
  local index = 1
  while true do
    local found = entry(index)
    if not found then return -1 end
    need = need - found[column]
    if need <= 0 then return found[1] end
    index = index + 1
  end
end

-- Each request that waits, one after another.
local reply, got_r, got_t, got_c = {}, 0, 0, 0
local queued_r, queued_t, refused = 0, 0, false
local overage = not block and math.min(left_d, left_m) <= 0
for i = 1, asks do
  local tokens = tonumber(ARGV[21 + i])
  local short, spared = {}, true
  local function check(kind, left, need, others)
    if left < need then
      short[#short + 1] = kind
      if left + others < need then spared = false end
    end
  end
  check(2, left_c, 1, soon_c)
  check(3, left_r, 1, soon_r)
  check(4, left_t, tokens, soon_t)
  if block then
    check(5, left_d, tokens, soon_t)
    check(6, left_m, tokens, soon_t)
  end
  local code, wait = 0, 0
  if #short == 0 then
    if math.min(left_d, left_m) < tokens then
      code, overage = 1, true
    end
    left_r, left_t, left_c = left_r - 1, left_t - tokens, left_c - 1
    left_d, left_m = left_d - tokens, left_m - tokens
    got_r, got_t, got_c = got_r + 1, got_t + tokens, got_c + 1
  else
    refused, code, wait = true, short[1], -1
    local minute = false
    for _, kind in ipairs(short) do
      local long = -1
      if kind == 3 then
        long, minute = slide(2, queued_r + 1 - left_r), true
      elseif kind == 4 then
        long, minute = slide(3, queued_t + tokens - left_t), true
      elseif kind == 5 then
        long = day_end
      elseif kind == 6 then
        long = month_end
      end
      if long > wait then code, wait = kind, long end
    end
    if minute then queued_r, queued_t = queued_r + 1, queued_t + tokens end
    if spared then code = code + 10 end
  end
  reply[2 * i - 1], reply[2 * i] = code, wait
end

-- Something to spare, if there is plenty.
local extra_r, extra_t, extra_c = 0, 0, 0
if not refused then
  local share = CAUTION * workers
  local tokens = overage and left_t or math.min(left_t, left_d, left_m)
  local function more(want, left) return math.max(0, math.min(want, math.floor(left / share))) end
  extra_r, extra_t, extra_c = more(want_r, left_r), more(want_t, tokens), more(want_c, left_c)
end
local more_r, more_t, more_c = keep_r + extra_r, keep_t + extra_t, keep_c + extra_c
redis.call('HSET', KEYS[1], worker, string.format('%d %d %d %d %d %d %d %d', number, delta_number,
  open_r + got_r + more_r, open_t + got_t + more_t, open_c + got_c + more_c, more_r, more_t, more_c))
redis.call('PEXPIRE', KEYS[1], 2 * FORGOTTEN)
keep_window()
local function left(value) return value < NEVER / 2 and math.max(0, value) or -1 end
return {
  workers, overage and 1 or 0, extra_r, extra_t, extra_c, left(left_r - extra_r), left(left_t - extra_t),
  left(left_c - extra_c), left(left_d - extra_t), left(left_m - extra_t), unpack(reply)
}
