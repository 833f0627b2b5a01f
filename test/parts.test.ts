/** Parts that run once in the life of a program, called in this process: how they start and end. */

import { afterAll, afterEach, beforeEach, describe, expect, spyOn, test } from "bun:test";
import { readFileSync, statSync } from "node:fs";
import * as jose from "jose";
import { fail, lifecycle, listenOptions, stopOnSignal } from "../config.ts";
import { cleanUp, eventually, freePort, temporaryDirectory, withModule } from "./support.ts";

type Client = typeof import("../client.ts");
const clientModule = () => withModule("client", {}, async (client: Client) => client);

const before = process.cwd();

beforeEach(() => process.chdir(temporaryDirectory()));
afterEach(() => {
  process.chdir(before);
  delete process.env["TLS_CERT"];
});
afterAll(cleanUp);

/** What the program would have ended with. */
function catchExit() {
  const codes: unknown[] = [];
  const exit = spyOn(process, "exit").mockImplementation(((code: unknown) =>
    codes.push(code)) as never);
  return { codes, restore: () => exit.mockRestore() };
}

describe("the development certificate", () => {
  const origin = new URL("https://localhost:5001");

  test("is made at the first start, and is the same at the next", async () => {
    const options = await listenOptions("ISSUER", origin);
    const pem = readFileSync("keys/localhost.pem", "utf8");
    expect(options).toMatchObject({ port: 5001, tls: { key: pem, cert: pem } });
    expect(pem).toContain("-----BEGIN PRIVATE KEY-----");
    expect(await listenOptions("API", origin)).toEqual(options);
    expect(statSync("keys/localhost.pem").mode & 0o777).toBe(0o600);
  });

  test("a TLS_CERT that is not there → an Error that names it", async () => {
    process.env["TLS_CERT"] = "nowhere.pem";
    await expect(listenOptions("ISSUER", origin)).rejects.toThrow(/^TLS_CERT must name a readable/);
  });
});

test("fail → one line on stderr, exit code 1; a broken certificate is named", () => {
  const { codes, restore } = catchExit();
  const error = spyOn(console, "error").mockImplementation(() => {});
  const end: (error: Error) => void = fail;
  end(new Error("two\nlines"));
  end(Object.assign(new Error("NO_START_LINE"), { code: "ERR_OSSL_PEM_NO_START_LINE" }));
  expect(error.mock.calls).toEqual([
    ["error: two lines"],
    ["error: TLS_CERT and TLS_KEY must be one pair in PEM: NO_START_LINE"],
  ]);
  expect(codes).toEqual([1, 1]);
  error.mockRestore();
  restore();
});

test("a signal → Connection: close, no new connections, closed, exit code 0; a second one → 1", async () => {
  const { codes, restore } = catchExit();
  const heard = (signal: string) => process.listeners(signal as "exit") as (() => void)[];
  const known = heard("SIGTERM");
  const server = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response() });
  const fields = new Headers();
  lifecycle.answers.push(fields);
  let closed = 0;
  stopOnSignal(server, async () => void closed++);
  const [signalled] = heard("SIGTERM").filter((one) => !known.includes(one));
  expect(heard("SIGINT")).toContain(signalled!);
  process.emit("SIGTERM");
  expect([lifecycle.stopping, fields.get("connection")]).toEqual([true, "close"]);
  expect((await fetch(server.url)).status).toBe(200); // for a moment it still answers
  await eventually("the end", () => codes.length);
  expect([codes, closed]).toEqual([[0], 1]);
  await expect(fetch(server.url)).rejects.toThrow();
  process.emit("SIGTERM");
  expect(codes).toEqual([0, 1]);
  await eventually("the end again, as this process goes on", () => codes.length === 3);
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.off(signal, signalled!);
  lifecycle.stopping = false;
  lifecycle.answers.pop();
  restore();
});

describe("client.ts", () => {
  test("untilUp comes back when the server takes connections", async () => {
    const { untilUp } = await clientModule();
    const port = freePort();
    let isUp = false;
    const waiting = untilUp(`http://127.0.0.1:${port}`).then(() => isUp);
    const timer = setTimeout(() => (isUp = true), 150);
    const server = await eventually("time goes by", () => isUp).then(() =>
      Bun.serve({ hostname: "127.0.0.1", port, fetch: () => new Response(null, { status: 404 }) }),
    );
    expect(await waiting).toBe(true);
    clearTimeout(timer);
    await server.stop(true);
  });

  test("makeKey → a private JWK in a file of mode 0600, the public one on stdout", async () => {
    const { makeKey } = await clientModule();
    const log = spyOn(console, "log").mockImplementation(() => {});
    await makeKey();
    const [[shown]] = log.mock.calls as [[string]];
    log.mockRestore();
    const { d, ...rest } = JSON.parse(readFileSync("keys/client.jwk", "utf8"));
    expect(JSON.parse(shown)).toEqual(rest);
    expect(rest.kid).toBe(await jose.calculateJwkThumbprint(rest));
    expect([typeof d, statSync("keys/client.jwk").mode & 0o777]).toEqual(["string", 0o600]);
    await expect(makeKey()).rejects.toThrow("EEXIST");
  });
});
