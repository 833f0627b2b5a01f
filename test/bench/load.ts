/**
 * Load for the bench: keeps each connection busy with one request at a time, in a process of its
 * own, so that making it costs the bench nothing.
 */

export interface Load {
  url: string;
  /** HTTP/1.1 requests as text, sent in this order. */
  requests: string[];
  /** Nothing is sent after the last one; else the first comes again. */
  isOnce: boolean;
  connections: number;
  seconds: number;
}

/** Errors are answers that are not 2xx, and connections that fail. */
export interface Answers {
  count: number;
  seconds: number;
  errors: number;
}

/** Runs a load. Rejects when its process fails or hangs. */
export async function run(load: Load): Promise<Answers> {
  const stdio = { stdin: new Blob([JSON.stringify(load)]), timeout: 30_000 };
  const child = Bun.spawn([process.execPath, import.meta.path], stdio);
  const report = await child.stdout.text();
  if ((await child.exited) !== 0) throw new Error(`the load for ${load.url} failed`);
  return JSON.parse(report);
}

async function send({ url, requests, isOnce, connections, seconds }: Load): Promise<Answers> {
  const { hostname, port } = new URL(url);
  const [started, over] = [performance.now(), Promise.withResolvers<void>()];
  let [sent, count, errors] = [0, 0, 0];
  const next = (socket: Bun.Socket<{ answer: string }>) => {
    socket.data = { answer: "" };
    if (isOnce && sent >= requests.length) over.resolve();
    else socket.write(requests[sent++ % requests.length]!);
  };
  const data = (socket: Bun.Socket<{ answer: string }>, chunk: Buffer) => {
    const answer = (socket.data.answer += chunk.toString("latin1"));
    const end = answer.indexOf("\r\n\r\n");
    const length = Number(/\r\ncontent-length: *(\d+)/i.exec(answer)?.[1] ?? 0);
    if (end < 0 || answer.length < end + 4 + length) return;
    count++;
    if (!answer.startsWith("HTTP/1.1 2")) errors++;
    next(socket);
  };
  const failed = () => void errors++;
  const socket = { open: next, data, close: failed, connectError: failed };
  const options = { hostname, port: Number(port), data: { answer: "" }, socket };
  for (let made = 0; made < connections; made++) Bun.connect(options).catch(() => {});
  await Promise.race([over.promise, Bun.sleep(seconds * 1000)]);
  return { count, seconds: (performance.now() - started) / 1000, errors };
}

if (import.meta.main) {
  console.log(JSON.stringify(await send(await Bun.stdin.json())));
  process.exit();
}
