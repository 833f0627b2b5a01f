/** The quickstart as a person runs it: real programs, real ports, and each way of going wrong. */

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { cleanUp, freeOrigin, launch, Program, root, temporaryDirectory } from "./support.ts";

afterAll(cleanUp);

const programs = ["config.ts", "idp.ts", "api.ts", "client.ts", "package.json", "bunfig.toml"];

/** A directory with what a clone and `bun install` give. */
function freshClone(): string {
  const directory = temporaryDirectory();
  for (const file of programs) cpSync(join(root, file), join(directory, file));
  symlinkSync(join(root, "node_modules"), join(directory, "node_modules"));
  return directory;
}

const readme = readFileSync(join(root, "README.md"), "utf8");

/** The lines of the output in the README, at other addresses; … stands for anything. */
function toldByReadme({ ISSUER, API_URL }: { ISSUER: string; API_URL: string }): RegExp[] {
  const [, output] = /```text\n(.+?)\n```/s.exec(readme)!;
  const lines = output!.split("\n").filter((line) => line !== "…");
  expect(lines.length).toBeGreaterThan(10);
  return lines.map((line) => {
    const here = line.replace("https://localhost:5001", ISSUER);
    const parts = here.replace("https://localhost:6001", API_URL).split(/…|\d{4}-\S+?Z/);
    return new RegExp(`^${parts.map(RegExp.escape).join(".+")}$`, "m");
  });
}

/** `bun start` in a process group of its own, as a terminal runs it. */
const startIn = (cwd: string, env: Record<string, string | undefined>) =>
  new Program([process.execPath, "start"], { cwd, env, detached: true });

/** Ctrl-C, which a terminal sends to the whole group. */
async function interrupt(start: Program): Promise<void> {
  process.kill(-start.process.pid, "SIGINT");
  await start.ended();
}

const environment = { PATH: process.env["PATH"], HOME: process.env["HOME"] };

describe("bun start", () => {
  test("in a fresh clone the claims are printed, and the servers stay until SIGINT", async () => {
    const env = { ...environment, ISSUER: freeOrigin(), API_URL: freeOrigin() };
    const cwd = freshClone();
    const start = startIn(cwd, env);
    await start.printed(/client:wait \| Done/);
    await start.printed(/token issued/, "stdout");
    for (const line of toldByReadme(env)) expect(start.stdout + start.stderr).toMatch(line);
    expect(start.stdout).toContain('client:wait |     "type": "client_id",');
    expect(start.stdout).toContain('client:wait |     "value": "client"');
    const health = await Promise.all(
      [env.ISSUER, env.API_URL].map((url) => fetch(`${url}/health`)),
    );
    expect(health.map(({ status }) => status)).toEqual([200, 200]);
    await interrupt(start);
    await expect(fetch(`${env.ISSUER}/health`)).rejects.toThrow();
  });

  test("the servers stay when the client fails", async () => {
    const env = {
      ...environment,
      ISSUER: freeOrigin(),
      API_URL: freeOrigin(),
      CLIENT_SECRET: "wrong",
    };
    const start = startIn(freshClone(), env);
    await start.printed(/client:wait \| Exited with code 1/);
    expect((await fetch(`${env.ISSUER}/health`)).status).toBe(200);
    await interrupt(start);
  });

  test("without `bun install` the missing package is named, exit code 1", async () => {
    const cwd = temporaryDirectory();
    mkdirSync(join(cwd, "clone"));
    for (const file of programs) cpSync(join(root, file), join(cwd, "clone", file));
    const idp = new Program([process.execPath, "run", "idp.ts"], {
      cwd: join(cwd, "clone"),
      env: environment,
    });
    expect(await idp.ended()).toBe(1);
    expect(idp.stderr).toMatch(/error: Cannot find package 'jose'/);
  });
});

test("bun build --compile idp.ts → one file that serves, and makes keys/ where it is started", async () => {
  const cwd = temporaryDirectory();
  const build = ["build", "--compile", "idp.ts", "--outfile", join(cwd, "idp")];
  const built = new Program([process.execPath, ...build], { cwd: root, env: environment });
  expect(await built.ended()).toBe(0);
  const ISSUER = freeOrigin();
  const idp = new Program([join(cwd, "idp")], { cwd, env: { ISSUER } });
  await idp.printed(/authorization server/);
  expect((await fetch(`${ISSUER}/health`)).status).toBe(200);
  expect(existsSync(join(cwd, "keys/keys.db"))).toBe(true);
  expect(await idp.stop("SIGTERM")).toBe(0);
});

describe("experiments", () => {
  const env = { ISSUER: freeOrigin(), API_URL: freeOrigin() };
  let idp: Program;
  let api: Program;

  beforeAll(async () => {
    idp = launch("idp", { env });
    api = launch("api", { env });
    await Promise.all([idp.printed(/authorization server/), api.printed(/API/)]);
  });

  /** What the client says at last when it fails; nothing else may be on stderr but its steps. */
  async function failureOf(changes: Record<string, string>): Promise<string> {
    const client = launch("client", { env: { ...env, ...changes } });
    expect(await client.ended()).toBe(1);
    const lines = client.stderr.trimEnd().split("\n");
    const steps = lines.slice(0, -1);
    expect(steps.filter((line) => !/^(Requesting a token|Calling) /.test(line))).toEqual([]);
    return lines.at(-1)!;
  }

  test("all is well → three JSON documents, exit code 0", async () => {
    const client = launch("client", { env });
    expect(await client.ended()).toBe(0);
    const documents = client.stdout.trim().split(/\n(?=[[{])/);
    const [token, decoded, claims] = documents.map((document) => JSON.parse(document));
    expect(Object.keys(token)).toEqual(["access_token", "token_type", "expires_in", "scope"]);
    expect(decoded.header).toEqual({ alg: "ES256", kid: decoded.header.kid, typ: "at+jwt" });
    const types = claims.map(({ type }: { type: string }) => type);
    expect(types).toEqual(["iss", "sub", "aud", "client_id", "scope", "iat", "nbf", "exp", "jti"]);
    for (const { type, value } of claims) expect(value).toBe(`${decoded.claims[type]}`);
  });

  const rows: [name: string, changes: Record<string, string>, answer: string][] = [
    [
      "identity server not running",
      { ISSUER: "http://127.0.0.1:9" },
      "error: Discovery failed at http://127.0.0.1:9/.well-known/openid-configuration: " +
        "ECONNREFUSED (Is it running? `bun start` starts everything.)",
    ],
    [
      "wrong client id",
      { CLIENT_ID: "nobody" },
      `error: The token request failed at ${env.ISSUER}/connect/token: 401 invalid_client ` +
        "Client authentication failed. The log of the server has the reason. " +
        "(Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY.)",
    ],
    [
      "wrong secret",
      { CLIENT_SECRET: "wrong" },
      `error: The token request failed at ${env.ISSUER}/connect/token: 401 invalid_client ` +
        "Client authentication failed. The log of the server has the reason. " +
        "(Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY.)",
    ],
    [
      "unknown scope",
      { SCOPE: "api2" },
      `error: The token request failed at ${env.ISSUER}/connect/token: 400 invalid_scope ` +
        "The scope is unknown, not granted, or belongs to several resources. " +
        "(Check SCOPE against the registration of the client.)",
    ],
  ];

  test.each(rows)(
    "%s → one line that says what to try, exit code 1",
    async (_, changes, answer) => {
      expect(await failureOf(changes)).toBe(answer);
    },
  );

  const attempts = [...readme.matchAll(/^\| (.*bun run client\.ts.*?) *\| (.*?) *\|$/gm)].flatMap(
    ([, commands, answer]) =>
      [...commands!.matchAll(/`([A-Z_]+)=(\w+) bun run client\.ts`/g)].map(([, name, value]) => ({
        name: name!,
        value: value!,
        code: /`(\d{3} \w+)`/.exec(answer!)?.[1],
      })),
  );

  test.each(attempts)("README, $name=$value → what it says", async ({ name, value, code }) => {
    if (code) return expect(await failureOf({ [name]: value })).toContain(`: ${code} `);
    const client = launch("client", { env: { ...env, [name]: value } });
    expect(await client.ended()).toBe(0);
    expect(client.stdout).toContain('"token_type": "DPoP"');
  });

  test("README, in a program of your own → the claims", async () => {
    const cwd = freshClone();
    const [, snippet] = /```ts\n(.+?)```/s.exec(readme)!;
    const program = `${snippet!.replace("https://localhost:6001", env.API_URL)}console.log(claims);`;
    writeFileSync(join(cwd, "own.ts"), program);
    const own = new Program([process.execPath, "own.ts"], { cwd, env: { ...environment, ...env } });
    expect(await own.ended()).toBe(0);
    expect(own.stdout).toContain('value: "client"');
  });

  test("API not running → one line that says what to try, exit code 1", async () => {
    const resource = freeOrigin();
    const scopes = [{ scope: "api1", description: "My API", resource }];
    const issuer = freeOrigin();
    const other = launch("idp", {
      env: { ISSUER: issuer, API_URL: resource },
      changes: { authorizationServer: { scopes } },
    });
    await other.printed(/authorization server/);
    expect(await failureOf({ ISSUER: issuer, API_URL: resource })).toBe(
      `error: The call failed at ${resource}/identity: ` +
        "ECONNREFUSED (Is it running? `bun start` starts everything.)",
    );
  });

  test("no token sent → 401 with both challenges and no error", async () => {
    const answer = await fetch(`${env.API_URL}/identity`);
    expect(answer.status).toBe(401);
    const challenges = answer.headers.get("www-authenticate");
    expect(challenges).toMatch(/^Bearer .+, DPoP /);
    expect(challenges).not.toContain("error");
  });

  test("API that requires another scope than the token has → 403", async () => {
    const scopes = [
      { scope: "api1", description: "My API", resource: env.API_URL },
      { scope: "read", description: "Reading", resource: env.API_URL },
    ];
    const clients = [
      {
        client_id: "reader",
        client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }],
        grant_types: ["client_credentials"],
        scope: "read",
        access_token_lifetime_seconds: 3600,
      },
    ];
    const issuer = freeOrigin();
    const resource = freeOrigin();
    for (const scope of scopes) scope.resource = resource;
    const servers = { ISSUER: issuer, API_URL: resource };
    const both = [
      launch("idp", { env: servers, changes: { authorizationServer: { scopes, clients } } }),
      launch("api", { env: servers }),
    ];
    await Promise.all([both[0]!.printed(/server/), both[1]!.printed(/API/)]);
    expect(await failureOf({ ...servers, CLIENT_ID: "reader", SCOPE: "read" })).toBe(
      `error: The call failed at ${resource}/identity: 403 insufficient_scope ` +
        "(Check SCOPE: the API requires another scope.)",
    );
  });

  test("a token outlives a restart of the server", async () => {
    const cwd = temporaryDirectory();
    const servers = { ISSUER: freeOrigin(), API_URL: freeOrigin() };
    const first = launch("idp", { cwd, env: servers });
    await first.printed(/server/);
    const body = new URLSearchParams({ grant_type: "client_credentials" });
    const headers = { authorization: `Basic ${btoa("client:secret")}` };
    const answer = await fetch(`${servers.ISSUER}/connect/token`, {
      method: "POST",
      body,
      headers,
    });
    const { access_token } = (await answer.json()) as { access_token: string };
    expect(await first.stop("SIGTERM")).toBe(0);
    const second = launch("idp", { cwd, env: servers });
    const api2 = launch("api", { env: servers });
    await Promise.all([second.printed(/server/), api2.printed(/API/)]);
    const authorization = `Bearer ${access_token}`;
    const call = await fetch(`${servers.API_URL}/identity`, { headers: { authorization } });
    expect(call.status).toBe(200);
  });
});
