/** The quickstart as a new user runs it: real programs in a copy of the project, and its experiments. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, readdirSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { eventually, freePort } from "../support/databases.ts";
import { launch, Program, root, temporaryDirectory } from "../support/programs.ts";
import { idp, pair } from "../support/servers.ts";

setDefaultTimeout(30_000);

type Environment = Record<string, string>;

/** A directory with what a clone has, and `bun install` if it was run. */
function clone({ isInstalled }: { isInstalled: boolean }): string {
  const directory = temporaryDirectory();
  for (const file of ["config.ts", "idp.ts", "api.ts", "client.ts", "package.json", "bunfig.toml"])
    cpSync(join(root, file), join(directory, file));
  if (isInstalled) symlinkSync(join(root, "node_modules"), join(directory, "node_modules"));
  return directory;
}

/** `bun start` in a process group of its own, as a terminal runs it. */
const bunStart = (cwd: string, env: Environment) =>
  new Program(["setsid", process.execPath, "--no-orphans", "start"], cwd, env);

/** Ctrl-C, which a terminal sends to the whole group. */
async function interrupt({ process: { pid, exited } }: Program): Promise<void> {
  process.kill(-pid, "SIGINT");
  await exited;
}

const statusOf = async (url: string) =>
  await fetch(url, { tls: { rejectUnauthorized: false } }).then(
    ({ status }) => status,
    () => "nobody there",
  );

/** The JSON documents that a client printed. */
const documents = (text: string) =>
  text
    .trim()
    .split(/\n(?=[[{])/)
    .map((document) => JSON.parse(document));

/** What a client says at last that fails: one line, after what it is doing. */
async function failure(client: Program): Promise<string> {
  expect(await client.ended()).toBe(1);
  const lines = client.stderr.trimEnd().split("\n");
  expect(lines.at(-1)).toStartWith("error: ");
  for (const line of lines.slice(0, -1)) expect(line).toMatch(/^(Requesting a token|Calling) /);
  return lines.at(-1)!.slice("error: ".length);
}

describe("bun start", () => {
  const env = {
    ISSUER: `https://localhost:${freePort()}`,
    API_URL: `https://localhost:${freePort()}`,
  };
  const cwd = clone({ isInstalled: true });
  let started: Program;

  beforeAll(async () => {
    started = bunStart(cwd, env);
    await started.printed(/client:wait.*Done/);
  });
  afterAll(async () => await interrupt(started));

  const runClient = (changes: Environment) =>
    launch("client", { cwd, env: { ...env, ...changes } });

  test("the client prints what it got, the servers their addresses and logs, and they stay", async () => {
    await started.printed(/token issued/, "stdout");
    const said = started.stdout + started.stderr;
    expect(said).toMatch(new RegExp(`^idp +\\| authorization server: ${env.ISSUER}$`, "m"));
    expect(said).toMatch(new RegExp(`^api +\\| API: ${env.API_URL}$`, "m"));
    expect(said).toContain(`client:wait | Requesting a token for client from ${env.ISSUER}\n`);
    expect(said).toContain(`client:wait | Calling ${env.API_URL}/identity\n`);
    const lines = started.stdout.split("\n").filter((line) => line.startsWith("client:wait | "));
    const printed = lines.map((line) => line.slice("client:wait | ".length)).join("\n");
    const [response, decoded, claims] = documents(printed);
    expect(response).toEqual({
      ...{ access_token: expect.any(String), token_type: "Bearer" },
      ...{ expires_in: 3600, scope: "api1" },
    });
    expect(decoded.header).toEqual({ alg: "ES256", typ: "at+jwt", kid: expect.any(String) });
    const { iat, nbf, exp, jti, ...others } = decoded.claims;
    const ids = { sub: "client", client_id: "client", scope: "api1" };
    expect(others).toEqual({ iss: env.ISSUER, aud: env.API_URL, ...ids });
    const all = Object.entries({ ...others, iat, nbf, exp, jti });
    const seen = all.map(([type, value]) => ({ type, value: `${value}` }));
    expect(new Set(claims)).toEqual(new Set(seen));
    const healths = [env.ISSUER, env.API_URL].map((url) => statusOf(`${url}/health`));
    expect(await Promise.all(healths)).toEqual([200, 200]);
    expect(readdirSync(join(cwd, "keys")).toSorted()).toContain("localhost.pem");
  });

  const failing: [name: string, changes: Environment, said: RegExp][] = [
    ["a wrong id", { CLIENT_ID: "nobody" }, /401 invalid_client .*\(Check CLIENT_ID and CLIENT_/],
    ["a wrong secret", { CLIENT_SECRET: "x" }, /401 invalid_client .*\(Check CLIENT_ID and CLIENT/],
    ["an unknown scope", { SCOPE: "api2" }, /400 invalid_scope .*\(Check SCOPE against the regist/],
  ];
  test.concurrent.each(failing)("with %s → one line with what to try", async (_, changes, said) => {
    const words = await failure(runClient(changes));
    expect(words).toStartWith(`The token request failed at ${env.ISSUER}/connect/token: `);
    expect(words).toMatch(said);
  });

  test.concurrent("with DPOP=1 → a bound token, and the API answers", async () => {
    const client = runClient({ DPOP: "1" });
    expect(await client.ended()).toBe(0);
    const [response, decoded, claims] = documents(client.stdout);
    expect(response.token_type).toBe("DPoP");
    const bound = { type: "cnf", value: JSON.stringify(decoded.claims.cnf) };
    expect(claims).toContainEqual(bound);
  });

  test.concurrent("a client that fails leaves the servers up until Ctrl-C", async () => {
    const own = {
      ISSUER: `http://127.0.0.1:${freePort()}`,
      API_URL: `http://127.0.0.1:${freePort()}`,
    };
    const other = bunStart(clone({ isInstalled: true }), { ...own, CLIENT_SECRET: "wrong" });
    await other.printed(/client:wait.*Exited with code 1/);
    expect(await statusOf(`${own.ISSUER}/health`)).toBe(200);
    await interrupt(other);
    const gone = async () => (await statusOf(`${own.ISSUER}/health`)) === "nobody there";
    await eventually("the server is gone", gone);
    const apiGone = async () => (await statusOf(own.API_URL)) === "nobody there";
    await eventually("the API is gone", apiGone);
  });
});

describe("what goes wrong without bun start", () => {
  test.concurrent("no servers → each client says so in one line, and leaves no file", async () => {
    const cwd = temporaryDirectory();
    const env = { ISSUER: "http://127.0.0.1:9", API_URL: "http://127.0.0.1:9" };
    const hint = "ECONNREFUSED (Is it running? `bun start` starts everything.)";
    const metadata = `${env.ISSUER}/.well-known/openid-configuration`;
    const words = await failure(launch("client", { cwd, env }));
    expect(words).toBe(`Discovery failed at ${metadata}: ${hint}`);
    const scopes = [{ scope: "api1", description: "My API", resource: env.API_URL }];
    const { url } = await idp({ scopes });
    const halfway = await failure(launch("client", { cwd, env: { ...env, ISSUER: url } }));
    expect(halfway).toBe(`The call failed at ${env.API_URL}/identity: ${hint}`);
    expect(readdirSync(cwd)).toEqual([]);
  });

  test.concurrent("an API that wants another scope → 403, and what to try", async () => {
    const servers = await pair({ api: { scope: "api2" } });
    const env = { ISSUER: servers.idp.url, API_URL: servers.api.url };
    const words = await failure(launch("client", { env }));
    expect(words).toStartWith(`The call failed at ${env.API_URL}/identity: 403 insufficient_scope`);
    expect(words).toEndWith("(Check SCOPE: the API requires another scope.)");
  });

  test.concurrent("no bun install → the missing package is named, exit code 1", async () => {
    const cwd = clone({ isInstalled: false });
    const program = new Program([process.execPath, "run", "idp.ts"], cwd);
    expect(await program.ended()).toBe(1);
    expect(program.stderr).toMatch(/error: .*'jose'/);
  });
});
