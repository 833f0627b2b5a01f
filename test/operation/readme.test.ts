/** The README: what it shows is run here, and what it names is there. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, existsSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { eventually, freePort } from "../support/databases.ts";
import { basic, post, send } from "../support/http.ts";
import { launch, Program, root, temporaryDirectory, urlOf } from "../support/programs.ts";

setDefaultTimeout(20_000);

const read = (file: string) => readFileSync(join(root, file), "utf8");
const readme = read("README.md");
const files = ["config.ts", "idp.ts", "api.ts", "client.ts"];
const sources = new Map(files.map((file) => [file, read(file)]));
const all = [...sources.values()].join("\n");

/** What stands in fences of a language. */
const blocks = (language: string) =>
  [...readme.matchAll(new RegExp(`\`\`\`${language}\\n([^]*?)\`\`\``, "g"))].map(
    ([, text]) => text!,
  );
const blockWith = (language: string, word: string) =>
  blocks(language).find((text) => text.includes(word))!;
const section = (title: string) => readme.split(`\n## ${title}`)[1]!.split("\n## ")[0]!;
const matches = (text: string, pattern: RegExp) =>
  [...text.matchAll(pattern)].map((found) => found);

/** A copy of the four files, in which examples run. */
function copy(changes: Record<string, string> = {}): string {
  const directory = temporaryDirectory();
  for (const file of [...files, "package.json"]) cpSync(join(root, file), join(directory, file));
  symlinkSync(join(root, "node_modules"), join(directory, "node_modules"));
  for (const [file, text] of Object.entries(changes)) writeFileSync(join(directory, file), text);
  return directory;
}

/** What a shell prints for a command, which must succeed. */
async function shell(command: string, cwd: string): Promise<string> {
  const program = new Program(["sh", "-c", command], cwd);
  expect([await program.ended(), program.stderr]).toEqual([0, ""]);
  return program.stdout;
}

// --- What it names -------------------------------------------------------------------------------

test("it has at most 250 lines, and every script and file that it names is there", () => {
  expect(readme.split("\n").length - 1).toBeLessThanOrEqual(250);
  const { scripts } = JSON.parse(read("package.json"));
  const run = matches(readme, /bun run ([\w.-]+)/g).map(([, name]) => name!);
  for (const name of run)
    expect([name, name in scripts || existsSync(join(root, name))]).toEqual([name, true]);
  expect(run.length).toBeGreaterThan(10);
  const [, copied = ""] = /^COPY (.+) \.\/$/m.exec(blockWith("dockerfile", "COPY"))!;
  for (const pattern of copied.split(" ")) {
    const found = [...new Bun.Glob(pattern).scanSync(root)];
    expect([pattern, found.length > 0]).toEqual([pattern, true]);
  }
});

test("its variables are those that config.ts reads", () => {
  const rows = section("Configuration")
    .split("\n")
    .filter((line) => line.startsWith("| `"));
  const named = rows.flatMap((row) =>
    matches(row.split("|")[1]!, /`(\w+)`/g).map(([, name]) => name!),
  );
  const proxies = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"];
  const read = matches(all, /env\["(\w+)"\]/g).map(([, name]) => name!);
  expect(new Set(named)).toEqual(new Set(read));
  expect(proxies.every((name) => all.includes(`"${name}"`))).toBe(true);
  const others = matches(blockWith("dockerfile", "ENV"), /(\w+)=/g).map(([, name]) => name!);
  for (const name of others) expect(named).toContain(name);
});

test("its choices are as many as are marked in the code", () => {
  const [, choices = ""] = /in the code\. ([^]*?) Left out/.exec(section("Choices"))!;
  expect(choices.split(/\. (?=[A-Z`])/).length).toBe(matches(all, /Choice:/g).length);
});

const conformance = section("Conformance")
  .split("\n")
  .slice(4)
  .filter((line) => line.startsWith("|"));
test.each(conformance)("%s", (row) => {
  const [, rules = "", , code = "", tests = ""] = row.split("|");
  const places = matches(code, /`(\w+\.ts)` ((?:`\w+`(?:, )?)+)/g);
  expect(places.length).toBeGreaterThan(0);
  const commented = places.map(([, file]) => sources.get(file!)!).join("\n");
  for (const [, file, names] of places)
    for (const [, name] of matches(names!, /`(\w+)`/g)) {
      const words = "export |async |function |readonly |const |#";
      const isThere = RegExp(`^ *(${words})*${name}\\b.*[({]$`, "m").test(sources.get(file!)!);
      expect([name, isThere]).toEqual([name, true]);
    }
  const shown = matches(tests, /`([\w/]+)`/g)
    .map(([, file]) => read(`test/${file}.test.ts`))
    .join("\n");
  for (const [, number, rule] of matches(rules, /(\d{4}) (§[\d.]+)/g)) {
    // Not §5 for §5.2, nor §4.1 for §4.11.
    const cited = RegExp(`RFC ${number}( §[\\d.]+ and)? ${rule}(?![.\\d]*\\d)`);
    expect([rule, cited.test(commented), cited.test(shown)]).toEqual([rule, true, true]);
  }
});

// --- What it shows -------------------------------------------------------------------------------

describe("examples", () => {
  test.concurrent("the test of another project passes, and leaves nothing behind", async () => {
    const cwd = copy({ "orders.test.ts": blockWith("ts", "bun:test") });
    const program = new Program([process.execPath, "test", "orders.test.ts"], cwd);
    expect([await program.ended(), program.stderr]).toEqual([0, expect.stringContaining("1 pass")]);
    expect(readdirSync(cwd)).not.toContain("keys");
  });

  test.concurrent("a POST route, a client of its own, and TokenSource", async () => {
    const route = blockWith("ts", '"POST /orders"').trim();
    const api = sources.get("api.ts")!.replace('  "GET /health"', `  ${route}\n  "GET /health"`);
    const scope = '{ scope: "orders", description: "Orders", resource }';
    const config = sources
      .get("config.ts")!
      .replace(/scopes: \[/, `scopes: [${scope}, `)
      .replace(/scope: apiScope,\n( +access_token)/, 'scope: "api1 orders",\n$1');
    const cwd = copy({ "api.ts": api, "config.ts": config });
    const env = { ISSUER: "http://127.0.0.1:0", SCOPE: "orders" };
    const started = (name: string, more = {}) =>
      new Program([process.execPath, "--no-orphans", name], cwd, { ...env, ...more });
    const API_URL = `http://127.0.0.1:${freePort()}`;
    const idp = started("idp.ts", { API_URL });
    const ISSUER = await urlOf(idp);
    const orders = started("api.ts", { ISSUER, API_URL });
    await urlOf(orders);
    const script = `${blockWith("ts", "new TokenSource")}
      const init = { method: "POST", body: JSON.stringify({ book: 1 }) };
      const order = await new TokenSource().fetch("https://localhost:6001/orders", init);
      console.log(answer.status, order.status, await order.text());`;
    writeFileSync(join(cwd, "run.ts"), script.replaceAll(/https:\/\/localhost:6001/g, API_URL));
    const caller = started("run.ts", { ISSUER, API_URL });
    expect([await caller.ended(), caller.stderr]).toEqual([0, ""]);
    expect(caller.stdout).toBe('403 200 {"client":"client","order":{"book":1}}\n');
    for (const program of [idp, orders]) await program.stop();
  });

  test.concurrent("the registration that FAPI 2.0 wants is accepted", async () => {
    const script = `${blockWith("ts", "fapiClient")}
      import { authorizationServer } from "./config.ts";
      import { start } from "./idp.ts";
      const local = { issuer: "http://127.0.0.1:0", databaseUrl: "sqlite://:memory:" };
      const { stop } = await start({ ...authorizationServer, ...local, clients: [fapiClient], drainSeconds: 0 });
      await stop();`;
    const cwd = copy({ "run.ts": script });
    const program = new Program([process.execPath, "run.ts"], cwd);
    expect([await program.ended(), program.stderr]).toEqual([0, ""]);
  });

  test.concurrent("a `$` in a value of .env must be written as `\\$`", async () => {
    const cwd = copy({ ".env": "OTHER=b\nCLIENT_ID=a$OTHER\nCLIENT_SECRET=a\\$OTHER\n" });
    const script = `import { client } from "./config.ts"; console.log(client.client_id, client.client_secret);`;
    const program = new Program([process.execPath, "--eval", script], cwd);
    expect([await program.ended(), program.stdout]).toEqual([0, "ab a$OTHER\n"]);
  });

  test.concurrent("curl -u with a raw `+` or `%` → 401, and the log says why", async () => {
    const secret = "a+b%c".padEnd(32, "x");
    const sha256 = new Bun.CryptoHasher("sha256").update(secret).digest("base64");
    const config = sources.get("config.ts")!.replace(/sha256: "[^"]+"/, `sha256: "${sha256}"`);
    const cwd = copy({ "config.ts": config });
    const command = [process.execPath, "--no-orphans", "idp.ts"];
    const idp = new Program(command, cwd, { ISSUER: "http://127.0.0.1:0" });
    const url = `${await urlOf(idp)}/connect/token`;
    const options = "-s -o answer -w '%{http_code}' -d grant_type=client_credentials";
    const ask = (user: string) => shell(`curl ${options} -u '${user}' ${url}`, cwd);
    expect(await ask(`client:${secret}`)).toBe("401");
    expect(await ask(`client:${secret.replace("+", "%2B").replace("%c", "%25c")}`)).toBe("200");
    await eventually("it is logged", () => idp.log.some(({ event }) => event === "token issued"));
    expect(idp.log.find(({ reason }) => reason)!["reason"]).toContain("not form-encoded");
    await idp.stop();
  });

  test.concurrent("jq finds in the log who was refused, how many tokens, the slowest", async () => {
    const cwd = temporaryDirectory();
    const idp = launch("idp", { cwd, env: { ISSUER: "http://127.0.0.1:0" } });
    const url = `${await urlOf(idp)}/connect/token`;
    const grant = { grant_type: "client_credentials" };
    for (const secret of ["secret", "wrong", "secret"])
      await post(url, grant, { authorization: basic("client", secret) });
    expect((await send(url)).status).toBe(405);
    expect(await idp.stop("SIGTERM")).toBe(0);
    writeFileSync(join(cwd, "idp.log"), idp.stdout);
    const commands = matches(section("In production"), /`(jq [^`]+)`/g).map(([, text]) => text!);
    const [refused, counted, slowest] = await Promise.all(commands.map((text) => shell(text, cwd)));
    expect(refused!.trim().split("\t").slice(1, 3)).toEqual(["client", "invalid_client"]);
    expect(counted!.trim().split(/\s+/)).toEqual(["2", "client"]);
    expect(JSON.parse(slowest!)).toHaveProperty("milliseconds");
  });

  const analyze = Bun.which("systemd-analyze");
  const why = analyze ? "" : " (skipped: there is no systemd-analyze)";
  test.skipIf(!analyze)(`systemd takes the unit${why}`, async () => {
    const cwd = temporaryDirectory();
    const unit = blockWith("ini", "ExecStart").replace(/^ExecStart=\S+/m, "ExecStart=/bin/sh");
    writeFileSync(join(cwd, "idp.service"), unit);
    expect(await shell("systemd-analyze verify --man=no ./idp.service 2>&1", cwd)).toBe("");
    for (const line of ["Restart=always", "RestartSec=2"]) expect(unit.split("\n")).toContain(line);
  });
});
