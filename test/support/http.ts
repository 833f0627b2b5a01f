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
  return await send(url, {
    method: "POST",
    body: encoded,
    headers: { "content-type": form, ...headers },
  });
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
  timer = setTimeout(resolve, 2_000);
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
