/**
 * Load for the bench: keeps each connection busy with one request at a time, with `wrk` where it is
 * installed, else with a loop of its own; either is a process of its own.
 */

import { join } from "node:path";

export interface Load {
  url: string;
  /** HTTP/1.1 requests as text, sent in this order. */
  requests: string[];
  /** Nothing is sent after the last one; else the first comes again. */
  isOnce: boolean;
  connections: number;
  seconds: number;
}

/** Errors are answers that are not 2xx, connections that fail, and timeouts. */
export interface Answers {
  count: number;
  seconds: number;
  errors: number;
}

const separator = "\x01";

/** wrk calls init once, request for each request (in its one thread), and done at the end. */
const wrkScript = String.raw`
local requests, sent = {}, 0

function init(arguments)
  for text in io.open(arguments[1], "rb"):read("*a"):gmatch("[^\1]+") do
    requests[#requests + 1] = text
  end
  isOnce = arguments[2] == "true"
end

function request()
  sent = sent + 1
  if isOnce then return requests[sent] or "" end -- nothing is sent for an empty one
  return requests[(sent - 1) % #requests + 1]
end

function done(summary)
  local failed = summary.errors
  local errors = failed.connect + failed.read + failed.write + failed.status + failed.timeout
  local report = '{"count":%d,"seconds":%f,"errors":%d}'
  print(string.format(report, summary.requests, summary.duration / 1e6, errors))
end
`;

export const hasWrk = Bun.which("wrk") !== null && process.env["BENCH_LOAD"] !== "own";

/** Runs a load, with its files in `directory`. Throws when the generator fails or hangs. */
export async function run(load: Load, directory: string): Promise<Answers> {
  const { url, requests, isOnce, connections, seconds } = load;
  const [file, script] = [join(directory, "requests"), join(directory, "load.lua")];
  await Promise.all([Bun.write(file, requests.join(separator)), Bun.write(script, wrkScript)]);
  const limits = ["-t", "1", "-c", `${connections}`, "-d", "60s", "--timeout", "20s"];
  const command = hasWrk
    ? ["wrk", ...limits, "-s", script, url, "--", file, `${isOnce}`]
    : [process.execPath, import.meta.path, url, file, `${isOnce}`, `${connections}`];
  const child = Bun.spawn(command, { stdin: "ignore", stderr: "pipe", timeout: 30_000 });
  // Both end on an interrupt, and then report. (wrk itself counts whole seconds.)
  const interrupt = setTimeout(() => child.kill("SIGINT"), seconds * 1000);
  const output = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  clearTimeout(interrupt);
  const report = output[0].split("\n").find((line) => line.startsWith("{"));
  if (!report) throw new Error(`no report of ${command[0]}: ${output.join(" ").slice(0, 1_000)}`);
  return JSON.parse(report);
}

/** The loop of our own, on raw sockets, until the process is interrupted. */
function loop({ url, requests, isOnce, connections }: Omit<Load, "seconds">): void {
  const { hostname, port } = new URL(url);
  const started = performance.now();
  let [sent, count, errors] = [0, 0, 0];
  const send = (socket: Bun.Socket<{ answer: string }>) => {
    socket.data = { answer: "" };
    if (!isOnce || sent < requests.length) socket.write(requests[sent++ % requests.length]!);
  };
  const data = (socket: Bun.Socket<{ answer: string }>, chunk: Buffer) => {
    const answer = (socket.data.answer += chunk.toString("latin1"));
    const head = answer.indexOf("\r\n\r\n");
    const length = Number(/\r\ncontent-length: *(\d+)/i.exec(answer)?.[1] ?? 0);
    if (head < 0 || answer.length < head + 4 + length) return;
    count += 1;
    if (!answer.startsWith("HTTP/1.1 2")) errors += 1;
    send(socket);
  };
  const failed = () => void (errors += 1);
  const socket = { open: send, data, close: failed, connectError: failed };
  for (let made = 0; made < connections; made++) {
    const options = { hostname, port: Number(port), data: { answer: "" }, socket };
    Bun.connect(options).catch(() => {}); // connectError counts it
  }
  process.on("SIGINT", () => {
    console.log(JSON.stringify({ count, seconds: (performance.now() - started) / 1000, errors }));
    process.exit();
  });
}

if (import.meta.main) {
  const [url = "", file = "", isOnce, connections] = process.argv.slice(2);
  const requests = (await Bun.file(file).text()).split(separator);
  loop({ url, requests, isOnce: isOnce === "true", connections: Number(connections) });
}
