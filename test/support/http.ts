/** The HTTP client of the tests: every answer whole, and nothing done behind the test's back. */

import { expect } from "bun:test";

export interface Answer {
  status: number;
  headers: Headers;
  text: string;
  /** The members of a JSON body, or undefined. */
  json: any;
}

/** Sends a request; redirects are not followed. */
export async function send(url: string, init: BunFetchRequestInit = {}): Promise<Answer> {
  const response = await fetch(url, { redirect: "manual", ...init });
  const text = await response.text();
  return { status: response.status, headers: response.headers, text, json: parsed(text) };
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

export const form = "application/x-www-form-urlencoded";

/** A POST to a token endpoint: `parameters` as a form, or `body` byte for byte. */
export async function post(
  url: string,
  body: Record<string, string> | string | Uint8Array<ArrayBuffer>,
  headers: Record<string, string> = {},
): Promise<Answer> {
  const isRaw = typeof body === "string" || body instanceof Uint8Array;
  const encoded = isRaw ? body : new URLSearchParams(body).toString();
  const fields = { "content-type": form, ...headers };
  return await send(url, { method: "POST", body: encoded, headers: fields });
}

/** An Authorization field for Basic, byte for byte: nothing is form-encoded. */
export const basic = (id: string, secret: string) =>
  `Basic ${Buffer.from(`${id}:${secret}`).toString("base64")}`;

/** The challenges of WWW-Authenticate: the parameters of each, by its scheme in lower case. */
export function challenges({ headers }: Answer): Record<string, Record<string, string>> {
  const found: Record<string, Record<string, string>> = {};
  let parameters: Record<string, string> = {};
  const pattern = /(?:^|, )([A-Za-z]+) (?=[a-z_]+=")|([a-z_]+)="((?:[^"\\]|\\.)*)"/g;
  for (const [, scheme, name, value] of (headers.get("www-authenticate") ?? "").matchAll(pattern)) {
    if (scheme) found[scheme.toLowerCase()] = parameters = {};
    if (name) parameters[name] = value!;
  }
  return found;
}

/** Sends bytes over a connection of its own, and reads until the server closes it or falls silent. */
export async function raw(url: string, bytes: string, silenceMs = 300): Promise<string> {
  const { hostname, port } = new URL(url);
  let text = "";
  let timer: Timer;
  const { promise, resolve } = Promise.withResolvers<void>();
  const socket = await Bun.connect({
    hostname,
    port: Number(port),
    socket: {
      data(_socket, chunk) {
        text += chunk.toString("latin1");
        clearTimeout(timer);
        timer = setTimeout(resolve, silenceMs);
      },
      close: () => resolve(),
      error: () => resolve(),
    },
  });
  timer = setTimeout(resolve, 10_000);
  socket.write(bytes);
  await promise;
  clearTimeout(timer);
  socket.terminate();
  return text;
}

/** The header fields that do not change from one answer to the next. */
export function fieldsOf({ headers }: Answer): Record<string, string> {
  const { date: _date, ...fields } = headers.toJSON();
  return fields;
}

/**
 * A refusal by the token endpoint, as "400 invalid_request". Throws for one that lacks what every
 * refusal has: JSON that no cache keeps, and a challenge if and only if the status is 401.
 */
export function refusalOf(answer: Answer): string {
  const { "content-type": type, "content-length": _length, ...fields } = fieldsOf(answer);
  const { "www-authenticate": challenge, "retry-after": wait, ...others } = fields;
  expect(others).toEqual({ "cache-control": "no-store", pragma: "no-cache" });
  expect(type).toMatch(/^application\/json(;|$)/);
  expect(challenge !== undefined).toBe(answer.status === 401);
  expect(wait !== undefined).toBe(answer.status === 503);
  expect(Object.keys(answer.json).toSorted()).toEqual(["error", "error_description"]);
  // RFC 6749 §5.2: the characters that error_description may have.
  expect(answer.json.error_description).toMatch(/^[\x20-\x21\x23-\x5B\x5D-\x7E]+$/);
  return `${answer.status} ${answer.json.error}`;
}

/**
 * A refusal by an API, as "401 invalid_token at bearer" (RFC 6750 §3, RFC 9449 §7.1). Throws for one
 * that lacks what every refusal has: the challenges of both schemes, with an error in one at most.
 */
export function callRefusalOf(answer: Answer): string {
  const { bearer, dpop, ...others } = challenges(answer);
  expect(others).toEqual({});
  let refusal = `${answer.status}`;
  for (const [scheme, challenge] of Object.entries({ bearer, dpop })) {
    const { resource_metadata, algs, error, error_description, scope, ...more } = challenge!;
    expect(more).toEqual({});
    expect(resource_metadata).toMatch(/^http.+\/\.well-known\/oauth-protected-resource(\/|$)/);
    expect(algs !== undefined).toBe(scheme === "dpop");
    expect(scope !== undefined).toBe(error === "insufficient_scope");
    // RFC 6750 §3: no quotation mark, no backslash; the text is there if the error is.
    const text = error === undefined ? /^$/ : /^[ !#-[\]-~]{10,}$/;
    expect(error_description ?? "").toMatch(text);
    if (error !== undefined) refusal += ` ${error} at ${scheme}`;
  }
  expect(answer.text).toMatch(/^[ -~]{10,}$/);
  expect(answer.headers.get("cache-control")).toBe("no-store");
  expect(answer.headers.get("retry-after")).toBeNull();
  return refusal;
}

/** A row for each of these values, named after it. */
export const rowsOf = <Value, Row>(
  rule: string,
  values: readonly Value[],
  row: (value: Value) => Row,
): [rule: string, row: Row][] =>
  values.map((value) => [`${rule} ${JSON.stringify(value)}`, row(value)]);

// --- A server that a test plays ------------------------------------------------------------------

/** A request, which is the nth of its kind. */
export interface Received {
  kind: "metadata" | "token" | "api";
  nth: number;
  method: string;
  target: string;
  headers: Headers;
  body: string;
  /** Of the server that it came to. */
  origin: string;
}

/** An answer, or the members of one. */
export type Reply = (received: Received) => unknown;

/** An issuer and an API in one, which answers each kind of request in its own way. */
export function play(replies: Record<Received["kind"], Reply>) {
  const requests: Received[] = [];
  const of = (kind: Received["kind"]) => requests.filter((received) => received.kind === kind);
  const { port } = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch(request) {
      const { method, headers, url } = request;
      const { pathname, search } = new URL(url);
      const isToken = method === "POST" && pathname === "/token";
      const kind = isToken ? "token" : pathname.startsWith("/.well-known") ? "metadata" : "api";
      const body = await request.text();
      const target = pathname + search;
      const nth = of(kind).length + 1;
      const received: Received = { kind, nth, method, target, headers, body, origin };
      requests.push(received);
      const answer = await replies[kind](received);
      return answer instanceof Response ? answer : Response.json(answer);
    },
  });
  const origin = `http://127.0.0.1:${port}`;
  return { origin, requests, of };
}

export const plain = (text: string, status = 200, headers = {}) =>
  new Response(text, { status, headers });

/** JSON with as many spaces after it as make it so long. */
export const padded = (members: unknown, bytes: number) =>
  plain(JSON.stringify(members).padEnd(bytes));

export const zipped = (body: string | Uint8Array<ArrayBuffer>) =>
  new Response(Bun.gzipSync(body), { headers: { "content-encoding": "gzip" } });
