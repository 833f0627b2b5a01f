/** Settings: each value and each mistake, where the servers listen, and whom all three trust. */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { readdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { authorizationServer, type AuthorizationServerSettings } from "../../config.ts";
import { eventually } from "../support/databases.ts";
import { send } from "../support/http.ts";
import { key } from "../support/jwt.ts";
import { launch, Program, root, temporaryDirectory, urlOf } from "../support/programs.ts";
import { api, idp, pair, resource, tokenSource } from "../support/servers.ts";

setDefaultTimeout(20_000); // most programs run at the same time

type Settings = AuthorizationServerSettings;
type Files = Settings["tls"];

/** Why a server does not start; one that does is stopped, and gives its address. */
async function outcome(starting: ReturnType<typeof api>): Promise<string> {
  return await starting.then(
    async ({ url, stop }) => await stop().then(() => `starts: ${url}`),
    ({ message }: Error) => message,
  );
}

/** What a program says that ends with exit code 1: one line, after what it is doing. */
async function lastWords(program: Program): Promise<string> {
  expect([await program.ended(), program.stdout]).toEqual([1, ""]);
  expect(program.stderr).toMatch(/^(Requesting a token [^\n]+\n)?error: [^\n]+\n$/);
  return program.stderr.replace(/^(.+\n)?error: /, "").trimEnd();
}

const sha256 = new Bun.CryptoHasher("sha256").update("secret").digest("base64");
const read = (file: string) => readFileSync(file, "utf8");
const modeOf = (path: string) => (statSync(path).mode & 0o777).toString(8);
const https = "https://127.0.0.1:0";

// --- Values --------------------------------------------------------------------------------------

describe("values", () => {
  async function valuesWith(env: Record<string, string>) {
    const script = `import * as config from "${root}/config.ts";
      const { authorizationServer, resourceServer, client } = config;
      console.log(JSON.stringify([authorizationServer, resourceServer, client]));`;
    const program = new Program([process.execPath, "--eval", script], temporaryDirectory(), env);
    expect([await program.ended(), program.stderr]).toEqual([0, ""]);
    return JSON.parse(program.stdout);
  }

  const acceptedAlgorithms = [
    ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    ...["EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
  ];
  const tls = { developmentFile: "keys/localhost.pem" };
  const urls = { issuer: "https://localhost:5001", resource: "https://localhost:6001" };
  const both = { tls, reusePort: false, drainSeconds: 0.5, log: "stdout", acceptedAlgorithms };
  const registered = { client_id: "client", client_secrets: [{ sha256 }], scope: "api1" };
  const granted = { grant_types: ["client_credentials"], access_token_lifetime_seconds: 3_600 };
  const lives = { algorithms: ["ES256"], rotationSeconds: 7_776_000, retentionSeconds: 1_209_600 };
  const caches = { pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 };
  const database = { databaseUrl: "sqlite://keys/keys.db", databaseWaitSeconds: 30 };
  const keys = { refreshSeconds: 300, coolDownSeconds: 5, keepKeysSeconds: 86_400 };
  const bounds = { maxBodyBytes: 1_048_576, maxUsedProofs: 50_000 };
  const scopesAt = (of: string) => [{ scope: "api1", description: "My API", resource: of }];
  const defaults: [idp: object, api: object, client: object] = [
    {
      ...{ ...both, ...database, issuer: urls.issuer, scopes: scopesAt(urls.resource) },
      ...{ clients: [{ ...registered, ...granted }], signingKeys: { ...lives, ...caches } },
      keyEncryptionSecret: "",
    },
    { ...both, ...urls, ...keys, ...bounds, resource_name: "My API", scope: "api1" },
    { ...urls, client_id: "client", client_secret: "secret", scope: "api1", dpop: false, tls },
  ];

  const names = ["ISSUER", "API_URL", "DATABASE_URL", "KEY_ENCRYPTION_SECRET", "CLIENT_ID"];
  const others = [...names, "CLIENT_SECRET", "SCOPE", "HTTPS_PROXY", "LOG", "DPOP", "REUSE_PORT"];
  const empty = Object.fromEntries(others.map((name) => [name, ""]));
  const unset = [{}, empty, { DPOP: "0", REUSE_PORT: "0" }];
  test.concurrent.each(unset)("%j → those of the quickstart", async (env) =>
    expect(await valuesWith(env)).toEqual(defaults),
  );

  test.concurrent("every variable, each in its place; DPOP binds, whatever it says", async () => {
    const own = { issuer: "https://auth.example", resource: "https://api.example" };
    const parties = await valuesWith({
      ...{ ISSUER: own.issuer, API_URL: own.resource, TLS_CERT: "cert.pem", TLS_KEY: "key.pem" },
      ...{ ISSUER_LISTEN: "127.0.0.1:81", API_LISTEN: "127.0.0.1:82", REUSE_PORT: "1", LOG: "off" },
      ...{ DATABASE_URL: "postgres://db.example/keys", KEY_ENCRYPTION_SECRET: "none" },
      ...{ CLIENT_ID: "billing", CLIENT_SECRET: "hunter2", SCOPE: "read", CLIENT_KEY: "key.jwk" },
      ...{ DPOP: "yes", https_proxy: "http://proxy.example" },
    });
    const files = { ...tls, certificateFile: "cert.pem", keyFile: "key.pem" };
    const servers = { tls: files, reusePort: true, log: "off" };
    const stored = { databaseUrl: "postgres://db.example/keys", keyEncryptionSecret: "none" };
    const issuer = { issuer: own.issuer, listen: "127.0.0.1:81", scopes: scopesAt(own.resource) };
    const caller = { client_id: "billing", client_secret: "hunter2", scope: "read", dpop: true };
    expect(parties).toEqual([
      { ...defaults[0], ...servers, ...stored, ...issuer },
      { ...defaults[1], ...servers, ...own, listen: "127.0.0.1:82" },
      { ...own, ...caller, keyFile: "key.jwk", tls: files, proxyVariable: "https_proxy" },
    ]);
  });
});

// --- Addresses -----------------------------------------------------------------------------------

describe("ISSUER, API_URL, and where to listen", () => {
  const here = "127.0.0.1:0";
  const good: [url: string, listen: string][] = [
    ["https://auth.example.com", here],
    ["https://192.0.2.1:8443/a/b", here],
    ["http://[::1]", here],
    ["https://[::1]:5001", here],
    ["https://localhost:5001", here],
    ["https://auth.example.com", "0.0.0.0:0"],
    ["https://auth.example.com/auth", "localhost:0"],
    ["http://127.1.2.3/tenant", "127.1.2.3:0"],
  ];
  test.each(good)("%s is taken as it is, %s is plain http", async (url, listen) => {
    const ours = await idp({ issuer: url, listen });
    for (const running of [ours, await api(url, { resource: url, listen })]) {
      const { hostname, port } = running.server;
      expect([running.url, `${hostname}:0`, port! > 0]).toEqual([url, listen, true]);
      const { pathname } = new URL(`${url}/health`);
      const { status } = await send(`http://${hostname}:${port}${pathname}`);
      expect(status).toBe(running === ours ? 200 : 503); // no keys yet
      await running.stop();
    }
  });

  const malformed = [
    ...["127.0.0.1", "127.0.0.1:", "8080", ":8080", "127.0.0.1:http", "127.0.0.1:65536"],
    ...["127.0.0.1:-1", "127.0.0.1:80/", "127.0.0.1/:80", "127.0.0.1\\:80", "127.0.0.1?:80"],
    ...["127.0.0.1#:80", "user@127.0.0.1:80", "http://127.0.0.1:80", "::1:80", "127.0.0.1 :80"],
  ];
  // Plain http is for this machine, and a loopback issuer takes weak secrets.
  const beyond = ["0.0.0.0:0", "[::]:0", "proxy.example:0", "localhost.example:0", "128.0.0.1:0"];
  const shown = [
    ...["https://a.example?", "https://a.example#b", "https://user:hunter2@a.example"],
    ...["https://A.example", "HTTPS://a.example", "https://a.example:443", "https://a.example "],
  ];
  const insecure = [
    ...["http://a.example", "http://user:hunter2@a.example", "http://192.0.2.1", "http://[::]:1"],
    ...["http://localhost.example", "http://127.0.0.1.example", "http://example.localhost"],
    ...["http://0.0.0.0:5001", "http://[::2]:5001", "ftp://localhost", "user:hunter2@a.example"],
  ];
  const refused: [said: string, urls: string[], listens?: string[]][] = [
    ["must be a host and a path alone. Write https://a.example.", ["https://a.example/"]],
    ["must be a host and a path alone. Write https://a.example/b.", ["https://a.example/b/"]],
    ["Write https://a.example/b.", ["https://a.example/b?c", "https://a.example/c/../b"]],
    ["Write https://a.example.", shown],
    ["must be https, or http on a loopback host", insecure],
    ["must be https, or http on a loopback host", ["a.example", "https://"]],
    ["must be host:port", ["https://a.example", "http://127.0.0.1:0"], malformed],
    ["must be on a loopback host", ["https://localhost:0", "http://127.0.0.1:0"], beyond],
  ];
  test.each(refused)("%s: %j, %j", async (said, urls, listens = [here]) => {
    for (const [url, listen] of urls.flatMap((url) => listens.map((one) => [url, one] as const))) {
      const atIdp = await outcome(idp({ issuer: url, listen }));
      const atApi = await outcome(api("https://a.example", { resource: url, listen }));
      expect([url, listen, atIdp]).toEqual([url, listen, expect.stringContaining(said)]);
      expect(atIdp).toStartWith(listens.length > 1 ? "ISSUER_LISTEN " : "ISSUER ");
      expect(atApi).toBe(atIdp.replace(/^ISSUER(?=_)/, "API").replace(/^ISSUER/, "API_URL"));
      expect(atIdp).not.toContain("hunter2");
    }
  });

  test.each([80, 443])("without a port it is %s, as the scheme says", async (port) => {
    const issuer = port === 80 ? "http://127.0.0.1" : "https://127.0.0.1";
    const first = await idp({ issuer, tls: inFile(makePem()) }).catch(() => undefined);
    const reason = await outcome(idp({ issuer, tls: inFile(makePem()) })); // in use, or denied
    expect(reason).toMatch(new RegExp(`\\b${port}\\b`));
    await first?.stop();
  });

  const wrong: ["idp" | "api", env: Record<string, string>, said: RegExp][] = [
    ["idp", { ISSUER: "https://a.example/\r\n\t" }, /^ISSUER .*Write https:\/\/a\.example\.$/],
    ["api", { API_URL: "https://a.example" }, /TLS_CERT and TLS_KEY, or API_LISTEN behind a proxy/],
  ];
  test.concurrent.each(wrong)("%s.ts, %j → one line, exit code 1", async (program, env, said) => {
    const local = { ISSUER: "http://127.0.0.1:0" };
    expect(await lastWords(launch(program, { env: { ...local, ...env } }))).toMatch(said);
  });
});

// --- Mistakes in config.ts -----------------------------------------------------------------------

const { publicJwk } = await key();

describe("config.ts", () => {
  const { clients, signingKeys } = authorizationServer;
  const api1 = { scope: "api1", description: "My API", resource };
  const billing = { ...clients[0]!, client_id: "billing" };
  const { client_secrets: _, ...keyed } = { ...billing, jwks: { keys: [publicJwk] } };
  const base = JSON.stringify({ signingKeys, scopes: [api1], clients: [...clients, billing] });

  /** Valid settings, but for what stands at `path`; undefined takes it away. */
  function changed(path: string, value: unknown): Partial<Settings> {
    const settings: Record<string, any> = JSON.parse(base);
    const names = path.split(".");
    const last = names.pop()!;
    const place = names.reduce((members, name) => members[name], settings);
    place[last] = value;
    if (value === undefined) delete place[last];
    return settings;
  }

  const secretOf = (bytes: number) => Buffer.alloc(bytes, 7).toString("base64url");
  const good = secretOf(32);
  /** Twice the sum of poll, max-age, refresh and cool-down. */
  const caches = 2 * (10 + 60 + 300 + 5);
  const withTime = (name: string, seconds: number) => ({
    ...{ ...signingKeys, rotationSeconds: caches + 2, [name]: seconds },
  });
  const longer = { pollSeconds: 11, maxAgeSeconds: 61, refreshSeconds: 301, coolDownSeconds: 6 };
  /** Each with a rotation that is just too short for it. */
  const tooLong = Object.entries(longer).map(([name, time]) => withTime(name, time));
  const hashes = ["secret", "a".repeat(64), sha256.replace("+", "-"), sha256.slice(0, -1), ""];
  const privateNames = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];
  const privateKeys = privateNames.map((name) => ({
    keys: [publicJwk, { ...publicJwk, [name]: 1 }],
  }));
  const reserved = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"];
  const jwks_uri = "https://a.example/jwks";
  const lifetime = "access_token_lifetime_seconds";
  const alg = "token_endpoint_auth_signing_alg";

  type Rows = [said: string, path: string, values: unknown[]][];
  const ofServer: Rows = [
    ["starts", "signingKeys.rotationSeconds", [caches + 1]],
    ["starts", "signingKeys.maxAgeSeconds", [0.01]],
    ["starts", "scopes.0.resource", ["urn:example:api", `${resource}/v1?a`]],
    ["DATABASE_URL", "databaseUrl", ["mysql://a:hunter2@127.0.0.1/b", "file:keys.db"]],
    [
      "DATABASE_URL",
      "databaseUrl",
      ["keys/keys.db", "sqlite:", "sqlite://?a", "sqlite:memory", "sqlite:a\n"],
    ],
    ["KEY_ENCRYPTION_SECRET", "keyEncryptionSecret", [secretOf(31), `${good},`, ",none", sha256]],
    ["signingKeys.rotationSeconds must be over 750", "signingKeys.rotationSeconds", [caches]],
    ["signingKeys.rotationSeconds must be over 752", "signingKeys", tooLong],
    ["signingKeys: each", "signingKeys", Object.keys(longer).map((name) => withTime(name, 0))],
    ["signingKeys: rotation and", "signingKeys.retentionSeconds", [0, -1, NaN, 1.5, Infinity]],
    ["signingKeys: rotation and", "signingKeys.rotationSeconds", [NaN, 1e6 + 0.5, Infinity]],
    ["signingKeys: each", "signingKeys.pollSeconds", [901, NaN]],
    ["signingKeys: each", "signingKeys.maxAgeSeconds", [2_100_000]],
    ["signingKeys.algorithms", "signingKeys.algorithms", [[], ["HS256"], ["ES256", "es256"]]],
    ["scopes: api1: ", "scopes.0.resource", ["/api", "", `${resource}#`]],
    ["scopes: api1: ", "scopes.1", [{ ...api1, resource: "urn:b" }]],
    ["scopes: b: ", "scopes.1", [{ ...api1, scope: "b", resource: "" }]],
    ["clients: client: client_id", "clients.1.client_id", ["client"]],
    ["clients: : client_id", "clients.1.client_id", [""]],
  ];
  const ofClient: Rows = [
    ["starts", "", [billing, keyed, { ...keyed, jwks: undefined, jwks_uri: `${jwks_uri}?a` }]],
    ["starts", ".client_secrets.0.expires_at", [1, 99_999_999_999]],
    ["starts", `.${lifetime}`, [1, 1_209_600]],
    ["scope", ".scope", ["api2", "api1 api2", "", "api1  api1"]],
    ["client_secrets: ", ".client_secrets.0.sha256", [...hashes, `A${sha256}`, `${sha256}=`]],
    ["client_secrets: ", ".client_secrets.1", [{ sha256: "" }]],
    ["client_secrets: ", ".client_secrets.0.expires_at", [1e11]],
    ["needs", ".client_secrets", [undefined, []]],
    ["needs", "", [{ ...keyed, jwks: { keys: [] } }]],
    ["must not have both", "", [{ ...keyed, jwks_uri }]],
    ["jwks_uri", ".jwks_uri", ["http://a.example", "jwks"]],
    ["jwks has a private", ".jwks", privateKeys],
    ["claims", ".claims", reserved.map((name) => ({ a: 1, [name]: 1 }))],
    [alg, `.${alg}`, ["HS256", "none"]],
    [lifetime, `.${lifetime}`, [1_209_601, 0, -1, 0.5, "3600", undefined]],
  ];
  for (const [said, path, values] of ofClient)
    ofServer.push([`clients: billing: ${said}`, `clients.1${path}`, values]);
  test.each(ofServer)("%s: %s %j", async (said, path, values) => {
    const wanted = said.endsWith("starts") ? "starts: " : `config.ts: ${said}`;
    for (const value of values) {
      const message = await outcome(idp(changed(path, value)));
      expect([value, message]).toEqual([value, expect.stringContaining(wanted)]);
      expect(message).not.toContain("hunter2");
    }
  });
});

describe("what a person makes, and has", () => {
  test.concurrent("client.ts --new-key → a private file, a public JWK to paste, once", async () => {
    const cwd = temporaryDirectory();
    const make = () => launch("client", { cwd, arguments: ["--new-key"] });
    const made = make();
    expect([await made.ended(), made.stderr]).toEqual([0, ""]);
    const publicKey = JSON.parse(made.stdout);
    expect(Object.keys(publicKey).toSorted()).toEqual(["alg", "crv", "kid", "kty", "x", "y"]);
    const keyFile = join(cwd, "keys/client.jwk");
    const before = read(keyFile);
    expect(JSON.parse(before)).toEqual({ ...publicKey, d: expect.any(String) });
    expect([modeOf(keyFile), modeOf(join(cwd, "keys"))]).toEqual(["600", "700"]);
    expect(await lastWords(make())).toContain("keys/client.jwk");
    expect(read(keyFile)).toBe(before);
    const { client_secrets: _, ...registration } = authorizationServer.clients[0]!;
    const issuer = await idp({ clients: [{ ...registration, jwks: { keys: [publicKey] } }] });
    const { token_type } = await tokenSource(issuer.url, { keyFile }).accessToken();
    expect(token_type).toBe("Bearer");
    await issuer.stop();
  });

  const programs = ["config", "idp", "api", "client"];
  test.concurrent("a Bun that is too old → one line from each program", async () => {
    // Copies that need a later one than there is.
    const copies = temporaryDirectory();
    symlinkSync(join(root, "node_modules"), join(copies, "node_modules"));
    for (const name of programs) {
      const source = read(join(root, `${name}.ts`)).replace('"1.4.5"', '"1000.0.0"');
      writeFileSync(join(copies, `${name}.ts`), source);
    }
    const run = (name: string) => new Program([process.execPath, `${copies}/${name}.ts`], copies);
    const said = await Promise.all(programs.map((name) => lastWords(run(name))));
    const words = `needs Bun 1000.0.0 or later; this is ${Bun.version}.`;
    expect(said).toEqual(programs.map(() => expect.stringContaining(words)));
    expect(read(join(root, "config.ts"))).toContain('"1.4.5"');
  });
});

// --- Certificates --------------------------------------------------------------------------------

const openssl = Bun.which("openssl")!;
const run = (...words: string[]) => Bun.spawnSync([openssl, ...words]).stdout.toString();

/** A file with a key and its certificate, which is no authority. */
function makePem(names = "DNS:localhost", newkey = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]) {
  const file = join(temporaryDirectory(), "made.pem");
  const out = ["-subj", "/CN=made", "-keyout", file, "-out", file, "-newkey", ...newkey];
  const extensions = [`subjectAltName=${names}`, "basicConstraints=critical,CA:FALSE"];
  run("req", "-x509", "-nodes", ...out, ...extensions.flatMap((one) => ["-addext", one]));
  return file;
}
const certificateOf = (pem: string) => /-----BEGIN CERT[^]*/.exec(pem)![0];
const keyOf = (pem: string) => pem.replace(certificateOf(pem), "");

/** The key with another certificate of it. */
function again(...how: string[]): string {
  const file = makePem();
  return run("x509", "-in", file, "-signkey", file, ...how) + keyOf(read(file));
}

/** For TLS_CERT and TLS_KEY, which may be one file. */
const inFile = (certificateFile: string, keyFile = certificateFile): Files => {
  return { certificateFile, keyFile, developmentFile: "" };
};
const development = (developmentFile: string): Files => ({
  ...{ certificateFile: undefined, keyFile: undefined, developmentFile },
});

/** The exit code of curl, which trusts the certificate in `ca` alone, and connects to `port`. */
async function curl(url: string, ca: string, port: number | undefined): Promise<number> {
  const connect = ["--connect-to", `::127.0.0.1:${port}`, "--noproxy", "*"];
  const words = ["curl", "--silent", "--output", "/dev/null", "--cacert", ca, ...connect, url];
  return await new Program(words, temporaryDirectory()).ended();
}

describe("development certificate", () => {
  test("it is for this machine and for servers, signs nothing, and lasts 825 days", async () => {
    const file = join(temporaryDirectory(), "new/localhost.pem");
    const running = await idp({ issuer: https, tls: development(file) });
    expect([modeOf(file), modeOf(join(file, ".."))]).toEqual(["600", "700"]);
    const { validTo, validFrom, publicKey } = new X509Certificate(read(file));
    expect((Date.parse(validTo) - Date.parse(validFrom)) / 86_400_000).toBe(825);
    expect(publicKey.asymmetricKeyDetails).toEqual({ namedCurve: "prime256v1" });
    const names = "basicConstraints,keyUsage,extendedKeyUsage,subjectAltName";
    const lines = run("x509", "-in", file, "-noout", "-ext", names)
      .trim()
      .split(/ *\n */);
    expect(lines.filter((line) => !line.endsWith(":")).toSorted()).toEqual([
      ...["CA:FALSE", "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1"],
      ...["Digital Signature", "TLS Web Server Authentication"],
      ...["X509v3 Basic Constraints: critical", "X509v3 Key Usage: critical"],
    ]);
    const { port } = running.server;
    for (const host of ["localhost", "127.0.0.1", "[::1]"])
      expect([host, await curl(`https://${host}/health`, file, port)]).toEqual([host, 0]);
    expect(await curl("https://other.example/health", file, port)).toBe(60); // not trusted
    await running.stop();
  });

  const authority = join(temporaryDirectory(), "authority");
  writeFileSync(authority, "basicConstraints=critical,CA:TRUE");
  const there: [name: string, pem: () => string, outcome: "kept" | "replaced" | "refused"][] = [
    ["one that holds", () => read(makePem()), "kept"],
    ["an expired one", () => again("-days", "-1"), "replaced"],
    ["an authority", () => again("-clrext", "-extfile", authority), "replaced"],
    ["an empty file", () => "", "refused"],
    ["one without its key", () => certificateOf(read(makePem())), "refused"],
    ["another's key", () => keyOf(read(makePem())) + certificateOf(read(makePem())), "refused"],
  ];
  test.each(there)("where there is %s", async (_, pem, expected) => {
    const developmentFile = join(temporaryDirectory(), "localhost.pem");
    const before = pem();
    writeFileSync(developmentFile, before);
    const words = await outcome(idp({ issuer: https, tls: development(developmentFile) }));
    const after = read(developmentFile);
    expect(after !== before).toBe(expected === "replaced");
    expect(readdirSync(join(developmentFile, ".."))).toEqual(["localhost.pem"]);
    if (expected === "refused")
      return expect(words).toMatch(/^\S+localhost\.pem is damaged or .*\. Delete it: /);
    expect(words).toStartWith("starts: ");
    const { ca, validTo } = new X509Certificate(after);
    expect([ca, Date.parse(validTo) > Date.now()]).toEqual([false, true]);
  });

  /** For PATH: a directory with a shell script in place of the openssl program. */
  function withOpenssl(commands: string): string {
    const directory = temporaryDirectory();
    writeFileSync(join(directory, "openssl"), `#!/bin/sh\n${commands}\n`, { mode: 0o755 });
    return `${directory}:${process.env["PATH"]}`;
  }
  const env = { ISSUER: https, API_URL: https };

  const failing: [name: string, PATH: string, said: RegExp][] = [
    ["no openssl", temporaryDirectory(), /^The program openssl is missing or failed: install it, /],
    ["one that fails", withOpenssl("exit 1"), /^The program openssl is .* use http on a loopback/],
  ];
  test.concurrent.each(failing)("%s → one line, no file", async (_, PATH, said) => {
    const cwd = temporaryDirectory();
    expect(await lastWords(launch("idp", { cwd, env: { ...env, PATH } }))).toMatch(said);
    expect(readdirSync(cwd, { recursive: true }).filter((name) => name !== "keys")).toEqual([]);
  });

  test.concurrent("servers that start at once make one, and a later start keeps it", async () => {
    const cwd = temporaryDirectory();
    const programs = (["idp", "api", "idp"] as const).map((name) => launch(name, { cwd, env }));
    const made = join(cwd, "keys/localhost.pem");
    for (const url of await Promise.all(programs.map(urlOf)))
      expect(await curl(`${url}/nothing`, made, Number(new URL(url).port))).toBe(0);
    const files = readdirSync(join(cwd, "keys")).filter((name) => !name.startsWith("keys.db"));
    expect(files).toEqual(["localhost.pem"]);
    const before = read(made);
    programs.push(launch("api", { cwd, env: { ...env, PATH: temporaryDirectory() } }));
    await urlOf(programs.at(-1)!);
    expect(read(made)).toBe(before);
    for (const program of programs) await program.stop();
  });

  test.concurrent("one that another makes meanwhile stays; drafts are private", async () => {
    const cwd = temporaryDirectory();
    const winner = makePem();
    const PATH = withOpenssl(`cp '${winner}' keys/localhost.pem
      for last; do :; done
      stat -c %a keys "$last" > modes
      exec ${openssl} "$@"`);
    const program = launch("idp", { cwd, env: { ...env, PATH } });
    await urlOf(program);
    expect(read(join(cwd, "modes"))).toBe("700\n600\n");
    expect(read(join(cwd, "keys/localhost.pem"))).toBe(read(winner));
    await program.stop();
  });
});

describe("own certificate", async () => {
  const file = makePem(undefined, ["rsa:2048"]);
  const running = await idp({ issuer: https, tls: inFile(file) });
  afterAll(() => running.stop());
  const pair = /^TLS_CERT and TLS_KEY must name a certificate and its key/;
  const rows: [name: string, changes: Partial<Files>, said: RegExp][] = [
    ["TLS_CERT not there", { certificateFile: "/nowhere.pem" }, pair],
    ["TLS_KEY not there", { keyFile: "/nowhere.pem" }, pair],
    ["TLS_CERT not set", { certificateFile: undefined }, pair],
    ["TLS_KEY not set", { keyFile: undefined }, pair],
    ["TLS_CERT no PEM", { certificateFile: import.meta.path }, pair],
    ["TLS_KEY of another", { keyFile: makePem() }, pair],
  ];
  test.each(rows)("%s → refused", async (_, changes, said) => {
    const tls = { ...inFile(file), ...changes };
    expect(await outcome(idp({ issuer: https, tls }))).toMatch(said);
    expect(await outcome(api(https, { resource: https, tls }))).toMatch(said);
  });

  test("https on a public host needs a certificate or a proxy; a proxy goes first", async () => {
    const issuer = "https://auth.example.com";
    const tls = development("unused.pem");
    const ways = "TLS_CERT and TLS_KEY, or ISSUER_LISTEN behind a proxy that ends TLS";
    expect(await outcome(idp({ issuer, tls }))).toBe(`${issuer} needs ${ways}.`);
    const half = await outcome(idp({ issuer, tls: { ...tls, keyFile: file } }));
    expect(half).toMatch(pair);
    const behind = await idp({ issuer, tls: inFile(file), listen: "127.0.0.1:0" });
    expect((await send(`http://127.0.0.1:${behind.server.port}/health`)).status).toBe(200);
    await behind.stop();
  });

  const suites: [version: string, suite: string, isTaken: boolean][] = [
    ["-tls1_3", "DEFAULT", true],
    ["-tls1_2", "ECDHE-RSA-AES256-GCM-SHA384", true],
    ["-tls1_2", "ECDHE-RSA-CHACHA20-POLY1305", true],
    ["-tls1_2", "AES128-GCM-SHA256", false], // no forward secrecy
    ["-tls1_2", "ECDHE-RSA-AES128-SHA", false], // no AEAD
    ["-tls1_1", "DEFAULT@SECLEVEL=0", false],
  ];
  const rules = "RFC 9325 §3.1.1, RFC 9325 §4.1, RFC 9325 §4.2:";
  test.each(suites)(`${rules} %s, %s → taken: %p`, async (version, suite, isTaken) => {
    const to = ["-connect", `127.0.0.1:${running.server.port}`, version, "-cipher", suite];
    const program = new Program([openssl, "s_client", ...to], temporaryDirectory());
    const isOver = (await program.ended()) === 0;
    expect([isOver, !program.stdout.includes("Cipher is (NONE)")]).toEqual([isTaken, isTaken]);
  });
});

// --- Trust, and proxies of the environment -------------------------------------------------------

test("the certificate in use is trusted on this machine; who merely fetches makes none", async () => {
  const own = inFile(makePem("IP:127.0.0.1,IP:0.0.0.0"));
  const issuer = await idp({ issuer: https, tls: own });
  const directory = temporaryDirectory();
  const elsewhere = issuer.url.replace("127.0.0.1", "0.0.0.0");
  const asked: [said: RegExp, tls: Files, url?: string][] = [
    [/^Bearer$/, own],
    [/^Bearer$/, development(own.certificateFile!)],
    [/\(Start all programs in one directory, or with the same TLS_CERT\.\)$/, inFile(makePem())],
    [/^Discovery failed at https:\/\/0\.0\.0\.0.*NODE_EXTRA_CA_CERTS/, own, elsewhere],
    [/CERT/, development(join(directory, "keys/localhost.pem"))],
  ];
  for (const [said, tls, url = issuer.url] of asked) {
    const asking = tokenSource(url, { tls }).accessToken();
    const type = asking.then(({ token_type }) => token_type);
    expect(await type.catch(({ message }: Error) => message)).toMatch(said);
  }
  expect(readdirSync(directory)).toEqual([]);
  await issuer.stop();
});

test("proxies of the environment see nothing of a loopback host, and are asked for another", async () => {
  let connections = 0;
  const socket = { open: (one: Bun.Socket) => void (connections++, one.end()), data: () => {} };
  const proxy = Bun.listen({ hostname: "127.0.0.1", port: 0, socket });
  const names = ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"];
  const address = `http://127.0.0.1:${proxy.port}`;
  const cwd = temporaryDirectory();
  const tls = development(join(cwd, "keys/localhost.pem"));
  const servers = await pair({ idp: { issuer: https, tls }, api: { tls } });
  const variables = Object.fromEntries(names.map((name) => [name, address]));
  const env = { ...variables, ISSUER: servers.idp.url, API_URL: servers.api.url };
  expect(await launch("client", { cwd, env }).ended()).toBe(0);
  // The API fetches its keys in the same way.
  const remote = launch("api", { cwd, env: { ...env, API_URL: "http://127.0.0.1:0" } });
  const url = await urlOf(remote);
  await eventually("it has keys", async () => (await send(`${url}/health`)).status === 200);
  await remote.stop();
  expect(connections).toBe(0);
  const far = launch("client", { cwd, env: { ...env, ISSUER: "https://auth.example.com" } });
  const hint = "(HTTPS_PROXY is set: check that proxy, or name the host in NO_PROXY.)";
  expect(await lastWords(far)).toEndWith(hint);
  expect(connections).toBeGreaterThan(0);
  proxy.stop(true);
  await Promise.all([servers.idp.stop(), servers.api.stop()]);
});
