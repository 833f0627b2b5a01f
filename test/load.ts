/**
 * Load for the bench: keeps each connection busy with one request at a time, with `wrk` where it is
 * installed, else with a loop of its own; either is a process of its own.
 */

import { join } from "node:path";

export interface Load {
  origin: string;
  /** HTTP/1.1 requests as text, sent in this order; after the last comes the first again. */
  requests: string[];
  connections: number;
  /** It ends after so many seconds, or so many requests. */
  seconds: number;
  count?: number;
}

/** Errors are answers that are not 2xx, connections that fail, and timeouts. */
export interface Figures {
  requests: number;
  seconds: number;
  p50Milliseconds: number;
  p99Milliseconds: number;
  errors: number;
}

const separator = "\x01";

/**
 * wrk calls init once, request for each request (in its one thread), done at the end. It ends by
 * whole seconds alone, so the thread stops itself, and the rest of wrk is interrupted until it takes
 * notice. Nothing is sent for an empty request. The latencies are corrected by wrk for coordinated
 * omission: a stall weighs as much as the requests that it held up.
 */
const wrkScript = String.raw`
local ffi = require("ffi")
ffi.cdef("int clock_gettime(int, long *)")
local time = ffi.new("long[2]")
local threads, requests, sent = {}, {}, 0

local function now()
  ffi.C.clock_gettime(1, time)
  return tonumber(time[0]) + tonumber(time[1]) / 1e9
end

function setup(thread)
  threads[1] = thread
end

function init(arguments)
  for text in io.open(arguments[1], "rb"):read("*a"):gmatch("[^\1]+") do
    requests[#requests + 1] = text
  end
  count, started, duration = tonumber(arguments[2]), now(), tonumber(arguments[3])
end

function request()
  if ended then return "" end
  local elapsed = now() - started
  if sent == count or elapsed >= duration then
    duration, ended = elapsed, true
    wrk.thread:stop()
    os.execute("(while kill -INT $PPID; do sleep 0.02; done) > /dev/null 2>&1 &")
    return ""
  end
  sent = sent + 1
  return requests[(sent - 1) % #requests + 1]
end

function done(summary, latency)
  local failed = summary.errors
  local errors = failed.connect + failed.read + failed.write + failed.status + failed.timeout
  local counted = '{"requests":%d,"seconds":%f,"errors":%d,'
  local latencies = '"p50Milliseconds":%f,"p99Milliseconds":%f}'
  print(string.format(counted .. latencies, summary.requests, threads[1]:get("duration"), errors,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
`;

/** Runs a load, with its files in `directory`. Throws when the generator fails or hangs. */
export async function run(load: Load, directory: string, useWrk: boolean): Promise<Figures> {
  const { origin, requests, connections, seconds, count = -1 } = load;
  const [file, script] = [join(directory, "requests"), join(directory, "load.lua")];
  await Promise.all([Bun.write(file, requests.join(separator)), Bun.write(script, wrkScript)]);
  const limits = ["-t", "1", "-c", `${connections}`, "-d", `${Math.ceil(seconds) + 10}s`];
  const rest = [origin, "--", file, `${count}`, `${seconds}`];
  const command = useWrk
    ? ["wrk", ...limits, "--timeout", "10s", "-s", script, ...rest]
    : [process.execPath, import.meta.path, `${connections}`, ...rest];
  const timeout = 1000 * (seconds + 20);
  const child = Bun.spawn(command, { stdin: "ignore", stderr: "pipe", timeout });
  const kill = () => child.kill("SIGKILL");
  process.on("exit", kill);
  const output = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  process.off("exit", kill);
  const report = output[0].split("\n").find((line) => line.startsWith("{"));
  if (!report) throw new Error(`no report of ${command[0]}: ${output.join(" ").slice(0, 1_000)}`);
  return JSON.parse(report);
}

/** The loop of our own, on raw sockets. */
function loop(load: Load): Promise<Figures> {
  const { origin, requests, connections, seconds, count } = load;
  const { hostname, port } = new URL(origin);
  const { promise, resolve } = Promise.withResolvers<Figures>();
  const milliseconds: number[] = [];
  const started = performance.now();
  let [sent, errors] = [0, 0];
  const end = () => {
    const sorted = milliseconds.sort((a, b) => a - b);
    const at = (share: number) => sorted[Math.floor(share * sorted.length)] ?? 0;
    const latency = { p50Milliseconds: at(0.5), p99Milliseconds: at(0.99) };
    const elapsed = (performance.now() - started) / 1000;
    resolve({ requests: sorted.length, seconds: elapsed, ...latency, errors });
  };
  const send = (socket: Bun.Socket<{ sentAt: number; answer: string }>) => {
    if (sent === count) return end();
    socket.data = { sentAt: performance.now(), answer: "" };
    socket.write(requests[sent++ % requests.length]!);
  };
  const data = (socket: Bun.Socket<{ sentAt: number; answer: string }>, chunk: Buffer) => {
    const answer = (socket.data.answer += chunk.toString("latin1"));
    const head = answer.indexOf("\r\n\r\n");
    const length = Number(/\r\ncontent-length: *(\d+)/i.exec(answer)?.[1] ?? 0);
    if (head < 0 || answer.length < head + 4 + length) return;
    milliseconds.push(performance.now() - socket.data.sentAt);
    if (!answer.startsWith("HTTP/1.1 2")) errors += 1;
    send(socket);
  };
  const failed = () => void (errors += 1);
  const socket = { open: send, data, close: failed, connectError: failed };
  for (let made = 0; made < connections; made++) {
    const start = { hostname, port: Number(port), data: { sentAt: 0, answer: "" }, socket };
    Bun.connect(start).catch(() => {}); // connectError counts it
  }
  setTimeout(end, 1000 * seconds);
  return promise;
}

if (import.meta.main) {
  const [connections, origin = "", , file = "", count, seconds] = process.argv.slice(2);
  const requests = (await Bun.file(file).text()).split(separator);
  const limits = { connections: Number(connections), count: Number(count) };
  console.log(
    JSON.stringify(await loop({ origin, requests, seconds: Number(seconds), ...limits })),
  );
  process.exit();
}
