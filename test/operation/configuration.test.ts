/** Settings: each value and each mistake, where the servers listen, and whom all three trust. */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { chmodSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { authorizationServer, type AuthorizationServerSettings, client } from "../../config.ts";
import { type ClientRegistration } from "../../config.ts";
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
    async ({ url, stop }) => {
      await stop();
      return `starts: ${url}`;
    },
    ({ message }: Error) => message,
  );
}

/** What a program says that ends with exit code 1: one line, after what it is doing. */
async function lastWords(program: Program): Promise<string> {
  expect([await program.ended(), program.stdout]).toEqual([1, ""]);
  expect(program.stderr).toMatch(/^(Requesting a token [^\n]+\n)?error: [^\n]+\n$/);
  return program.stderr.replace(/^(.+\n)?error: /, "").trimEnd();
}

// --- Values --------------------------------------------------------------------------------------

describe("values", () => {
  async function valuesWith(env: Record<string, string>, cwd = temporaryDirectory()) {
    const script = `import * as config from "${root}/config.ts";
      const { authorizationServer, resourceServer, client } = config;
      console.log(JSON.stringify([authorizationServer, resourceServer, client]));`;
    const program = new Program([process.execPath, "--eval", script], cwd, env);
    expect([await program.ended(), program.stderr]).toEqual([0, ""]);
    return JSON.parse(program.stdout) as Record<string, any>[];
  }

  const acceptedAlgorithms = [
    ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    ...["EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
  ];
  const tls = { developmentFile: "keys/localhost.pem" };
  const [issuer, apiUrl] = ["https://localhost:5001", "https://localhost:6001"];
  const both = { tls, reusePort: false, drainSeconds: 0.5, log: "stdout", acceptedAlgorithms };
  const sha256 = new Bun.CryptoHasher("sha256").update("secret").digest("base64");
  const defaults: [idp: object, api: object, client: object] = [
    {
      ...both,
      issuer,
      scopes: [{ scope: "api1", description: "My API", resource: apiUrl }],
      clients: [
        {
          ...{ client_id: "client", client_secrets: [{ sha256 }], scope: "api1" },
          ...{ grant_types: ["client_credentials"], access_token_lifetime_seconds: 3_600 },
        },
      ],
      signingKeys: {
        ...{ algorithms: ["ES256"], rotationSeconds: 7_776_000, retentionSeconds: 1_209_600 },
        ...{ pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 },
      },
      databaseUrl: "sqlite://keys/keys.db",
      databaseWaitSeconds: 30,
      keyEncryptionSecret: "",
    },
    {
      ...both,
      ...{ issuer, resource: apiUrl, resource_name: "My API", scope: "api1" },
      ...{ refreshSeconds: 300, coolDownSeconds: 5, keepKeysSeconds: 86_400 },
      maxBodyBytes: 1_048_576,
    },
    {
      ...{ issuer, resource: apiUrl, client_id: "client", client_secret: "secret", scope: "api1" },
      ...{ dpop: false, tls },
    },
  ];

  test.concurrent("without an environment: those of the quickstart", async () => {
    expect(await valuesWith({})).toEqual(defaults);
  });

  test.concurrent("empty variables, DPOP=0 and REUSE_PORT=0 count as not set", async () => {
    const names = ["ISSUER", "API_URL", "DATABASE_URL", "KEY_ENCRYPTION_SECRET", "CLIENT_ID"];
    const all = [...names, "CLIENT_SECRET", "SCOPE", "HTTPS_PROXY", "LOG"];
    const empty = Object.fromEntries(all.map((name) => [name, ""]));
    expect(await valuesWith({ ...empty, DPOP: "0", REUSE_PORT: "0" })).toEqual(defaults);
  });

  test.concurrent("every variable, each in its place", async () => {
    const urls = { issuer: "https://auth.example", resource: "https://api.example" };
    const parties = await valuesWith({
      ...{ ISSUER: urls.issuer, API_URL: urls.resource, TLS_CERT: "cert.pem", TLS_KEY: "key.pem" },
      ...{ ISSUER_LISTEN: "127.0.0.1:81", API_LISTEN: "127.0.0.1:82", REUSE_PORT: "1", LOG: "off" },
      ...{ DATABASE_URL: "postgres://db.example/keys", KEY_ENCRYPTION_SECRET: "none" },
      ...{ CLIENT_ID: "billing", CLIENT_SECRET: "hunter2", SCOPE: "read", CLIENT_KEY: "key.jwk" },
      ...{ DPOP: "1", HTTPS_PROXY: "http://proxy.example" },
    });
    const files = { ...tls, certificateFile: "cert.pem", keyFile: "key.pem" };
    const servers = { tls: files, reusePort: true, log: "off" };
    const scopes = [{ scope: "api1", description: "My API", resource: urls.resource }];
    const stored = { databaseUrl: "postgres://db.example/keys", keyEncryptionSecret: "none" };
    const own = { issuer: urls.issuer, listen: "127.0.0.1:81", scopes, ...stored };
    const caller = { client_id: "billing", client_secret: "hunter2", scope: "read", dpop: true };
    const others = { keyFile: "key.jwk", tls: files, proxyVariable: "HTTPS_PROXY" };
    expect(parties).toEqual([
      { ...defaults[0], ...servers, ...own },
      { ...defaults[1], ...servers, ...urls, listen: "127.0.0.1:82" },
      { ...urls, ...caller, ...others },
    ]);
  });

  test.concurrent("a file .env is read; DPOP=yes binds, for a slip must not unbind", async () => {
    const cwd = temporaryDirectory();
    writeFileSync(join(cwd, ".env"), "SCOPE=read\nDPOP=yes\nhttps_proxy=http://a\n");
    const { scope, dpop, proxyVariable } = (await valuesWith({}, cwd))[2]!;
    expect([scope, dpop, proxyVariable]).toEqual(["read", true, "https_proxy"]);
  });
});

// --- Addresses -----------------------------------------------------------------------------------

describe("ISSUER and API_URL", () => {
  const listen = "127.0.0.1:0";
  const good = [
    ...["https://auth.example.com", "https://auth.example.com:8443", "https://192.0.2.1/a/b"],
    ...["https://example.com/auth", "http://localhost:5001", "http://127.1.2.3/tenant"],
    ...["https://[::1]:5001", "http://[::1]"],
  ];
  test.each(good)("%s is taken as it is", async (url) => {
    expect(await outcome(idp({ issuer: url, listen }))).toBe(`starts: ${url}`);
    expect(await outcome(api(url, { resource: url, listen }))).toBe(`starts: ${url}`);
  });

  const bad: Record<string, string[]> = {
    "must not end in a slash. Write https://a.example.": ["https://a.example/"],
    "must not end in a slash. Write https://a.example/b.": ["https://a.example/b/"],
    "Write https://a.example/b.": ["https://a.example/b?c", "https://a.example/c/../b"],
    "Write https://a.example.": [
      ...["https://a.example?", "https://a.example#b", "https://user:hunter2@a.example"],
      ...["https://A.example", "HTTPS://a.example", "https://a.example:443", "https://a.example "],
    ],
    "must be https, or http on a loopback host": [
      ...["http://a.example", "http://user:hunter2@a.example", "http://192.0.2.1"],
      ...["http://localhost.example", "http://127.0.0.1.example", "http://example.localhost"],
      ...["http://0.0.0.0:5001", "http://[::]:5001", "http://[::2]:5001", "ftp://localhost"],
      ...["blob:https://a.example", "user:hunter2@a.example"],
    ],
    "is not a URL": ["a.example", "https://"],
  };
  const badUrls = Object.entries(bad).flatMap(([said, urls]) => urls.map((url) => ({ url, said })));
  test.each(badUrls)("$url → refused: $said", async ({ url, said }) => {
    const refusals = {
      ISSUER: await outcome(idp({ issuer: url, listen })),
      API_URL: await outcome(api("https://a.example", { resource: url, listen })),
    };
    for (const [setting, message] of Object.entries(refusals)) {
      expect(message).toStartWith(`${setting} `);
      expect(message).toContain(said);
      expect(message).not.toContain("hunter2");
    }
  });

  test("the issuer of others may end in a slash, at the API and the client", async () => {
    const settings = { resource: "https://api.example", listen };
    expect(await outcome(api("https://a.example/", settings))).toStartWith("starts: ");
    expect(await outcome(api("https://a.example?b", settings))).toMatch(/^ISSUER .*a\.example\.$/);
    const asked = async (changes: Partial<typeof client>) =>
      await tokenSource("http://127.0.0.1:9/", changes)
        .accessToken()
        .catch(({ message }) => message);
    expect(await asked({})).toStartWith("Discovery failed at http://127.0.0.1:9/.well-known/");
    expect(await asked({ issuer: "http://a.example" })).toMatch(/^ISSUER must be https/);
    expect(await asked({ resource: "http://a.example" })).toMatch(/^API_URL must be https/);
  });

  const wrong: ["idp" | "api" | "client", env: Record<string, string>, said: RegExp][] = [
    ["idp", { ISSUER: "https://a.example/\r\n\t" }, /^ISSUER .*Write https:\/\/a\.example\.$/],
    ["api", { API_URL: "https://a.example" }, /TLS_CERT and TLS_KEY, or API_LISTEN behind a proxy/],
    ["client", { ISSUER: "http://a.example" }, /^ISSUER must be https/],
    ["idp", { DATABASE_URL: "mysql://a:hunter2@b", LOG: "off" }, /^config\.ts: DATABASE_URL/],
  ];
  test.concurrent.each(wrong)("%s.ts, %j → one line, exit code 1", async (program, env, said) => {
    const local = { ISSUER: "http://127.0.0.1:0" };
    const words = await lastWords(launch(program, { env: { ...local, ...env } }));
    expect(words).toMatch(said);
    expect(words).not.toContain("hunter2");
  });
});

describe("where to listen", () => {
  const at: [listen: string, url: string, hostname: string][] = [
    ["127.0.0.1:0", "https://auth.example.com", "127.0.0.1"],
    ["0.0.0.0:0", "https://auth.example.com/a", "0.0.0.0"],
    ["localhost:0", "https://auth.example.com", "localhost"],
    ["127.1.2.3:0", "http://127.0.0.1:5001", "127.1.2.3"],
    ["127.0.0.1:0", "https://localhost:5001", "127.0.0.1"],
  ];
  test.each(at)("%s for %s → plain http there", async (listen, url, hostname) => {
    const ours = await idp({ issuer: url, listen });
    const another = await api(url, { resource: url, listen });
    for (const running of [ours, another]) {
      const { port } = running.server;
      expect([running.server.hostname, port! > 0, running.url]).toEqual([hostname, true, url]);
      const health = `http://${listen.replace(":0", `:${port}`)}${new URL(`${url}/health`).pathname}`;
      expect((await send(health)).status).toBe(running === ours ? 200 : 503); // no keys yet
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
  const rows = (list: string[], url: string, said: string) =>
    list.map((listen) => ({ listen, url, said }));
  const refused = [
    ...rows(malformed, "https://a.example", "must be host:port"),
    ...rows(malformed, "http://127.0.0.1:0", "must be host:port"),
    ...rows(beyond, "https://localhost:0", "must be on a loopback host"),
    ...rows(beyond, "http://127.0.0.1:0", "must be on a loopback host"),
  ];
  test.each(refused)("$listen for $url → refused: $said", async ({ listen, url, said }) => {
    expect(await outcome(idp({ issuer: url, listen }))).toStartWith(`ISSUER_LISTEN ${said}`);
    const refusal = await outcome(api("https://a.example", { resource: url, listen }));
    expect(refusal).toStartWith(`API_LISTEN ${said}`);
  });

  const implied: [url: string, listen: string | undefined, port: number][] = [
    ["http://127.0.0.1", undefined, 80],
    ["https://a.example", "127.0.0.1:80", 80],
    ["https://127.0.0.1", undefined, 443],
  ];
  test.each(implied)("%s, listening at %s → port %d, if it is free", async (url, listen, port) => {
    const words = await idp({ issuer: url, listen, tls: inFile(makePem()) }).then(
      async ({ server, stop }) => `It was ${server.port}. ${await stop()}`,
      ({ message }: Error) => message,
    );
    expect(words).toMatch(new RegExp(`\\b${port}\\b`));
  });
});

// --- Authorization server ------------------------------------------------------------------------

const sha256 = "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols="; // "secret"
const { publicJwk } = await key();

describe("mistakes in config.ts", () => {
  const [first] = authorizationServer.clients as [ClientRegistration];
  const api1 = { scope: "api1", description: "My API", resource };
  /** A second client, with what deviates from a valid registration. */
  const billing = (changes: Record<string, unknown>): Partial<Settings> => {
    const registration: Record<string, unknown> = { ...first, client_id: "billing", ...changes };
    for (const name in registration)
      if (registration[name] === undefined) delete registration[name];
    return { clients: [first, registration as unknown as ClientRegistration] };
  };
  const keys = (changes: Partial<Settings["signingKeys"]>): Partial<Settings> => ({
    signingKeys: { ...authorizationServer.signingKeys, ...changes },
  });
  const secretOf = (bytes: number) => Buffer.alloc(bytes, 7).toString("base64url");
  const withoutSecrets = { client_secrets: undefined };
  const jwks = { keys: [publicJwk] };
  const file = join(temporaryDirectory(), "keys.db");
  /** Twice the sum of poll, max-age, refresh and cool-down. */
  const caches = 2 * (10 + 60 + 300 + 5);

  const clientsWith = (field: string, values: unknown[]) =>
    values.map((value) => billing({ [field]: value }));
  const secretsWith = (...secrets: object[]) => billing({ client_secrets: secrets });
  const accepted: Partial<Settings>[] = [
    ...[keys({ rotationSeconds: caches + 1 }), keys({ maxAgeSeconds: 0.5, coolDownSeconds: 0.01 })],
    keys({ algorithms: ["Ed25519", "ES384"] }),
    ...[{ databaseUrl: `sqlite:${file}` }, { databaseUrl: `sqlite://${file}` }],
    ...["none", secretOf(32), `${secretOf(32)},none`, `${secretOf(32)},${secretOf(32)}`].map(
      (keyEncryptionSecret) => ({ keyEncryptionSecret }),
    ),
    ...[billing({}), billing({ ...withoutSecrets, jwks })],
    billing({ ...withoutSecrets, jwks_uri: "https://a.example/jwks" }),
    ...clientsWith("jwks_uri", ["http://127.0.0.1:9/jwks"]),
    ...[
      secretsWith({ sha256 }, { sha256, expires_at: 1 }),
      secretsWith({ sha256, expires_at: 99_999_999_999 }),
    ],
    ...clientsWith("claims", [{ tenant: "t1", ISS: "x", aud2: "y" }]),
    ...clientsWith("access_token_lifetime_seconds", [1, 1_209_600]),
    ...clientsWith("token_endpoint_auth_signing_alg", ["PS256", undefined]),
    { ...billing({ scope: "api1 b" }), scopes: [api1, { ...api1, scope: "b" }] },
    ...["urn:example:api", `${resource}/v1?a`].map((uri) => ({
      scopes: [{ ...api1, resource: uri }],
    })),
  ];
  const titleOf = ({ clients, ...others }: Partial<Settings>) =>
    JSON.stringify({ ...others, ...(clients && { client: clients[1] }) });
  for (const changes of accepted)
    test(`${titleOf(changes)} → starts`, async () => {
      expect(await outcome(idp(changes))).toStartWith("starts: ");
    });

  const keyNames = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];
  const claimNames = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"];
  const timeNames = ["poll", "maxAge", "refresh", "coolDown", "retention"];
  const tooShort = { rotationSeconds: caches + 2 }; // with one second more at any cache
  const refused: Record<string, Partial<Settings>[]> = {
    DATABASE_URL: [
      ...["mysql://a:hunter2@127.0.0.1/b", "file:keys.db", "keys/keys.db", "sqlite:", "xsqlite:a"],
    ].map((databaseUrl) => ({ databaseUrl })),
    KEY_ENCRYPTION_SECRET: [secretOf(31), secretOf(33), `${secretOf(32)},short`].map(
      (keyEncryptionSecret) => ({ keyEncryptionSecret }),
    ),
    "signingKeys.rotationSeconds must be over 750": [
      ...[keys({ rotationSeconds: caches }), keys({ rotationSeconds: NaN })],
    ],
    "signingKeys.rotationSeconds must be over 752": [
      ...[keys({ ...tooShort, pollSeconds: 11 }), keys({ ...tooShort, maxAgeSeconds: 61 })],
      ...[keys({ ...tooShort, refreshSeconds: 301 }), keys({ ...tooShort, coolDownSeconds: 6 })],
    ],
    "signingKeys: each time": timeNames.flatMap((name) =>
      [0, -1, NaN].map((seconds) => keys({ [`${name}Seconds`]: seconds })),
    ),
    "signingKeys.algorithms": [[], ["HS256"], ["none"], ["ES256", "es256"]].map((algorithms) =>
      keys({ algorithms }),
    ),
    "scopes: api1: ": [
      ...["/api", "", `${resource}#`].map((uri) => ({ scopes: [{ ...api1, resource: uri }] })),
      { scopes: [api1, { ...api1, resource: "urn:b" }] },
    ],
    "scopes: b: ": [{ scopes: [api1, { ...api1, scope: "b", resource: "" }] }],
    "clients: client: client_id": clientsWith("client_id", ["client"]),
    "clients: : client_id": clientsWith("client_id", [""]),
    "clients: billing: scope": clientsWith("scope", ["api2", "api1 api2", "", "api1  api1"]),
    "clients: billing: client_secrets: ": [
      ...["secret", "a".repeat(64), sha256.replace("+", "-"), sha256.slice(0, -1), ""].map((text) =>
        secretsWith({ sha256: text }),
      ),
      ...[secretsWith({ sha256: `A${sha256}` }), secretsWith({ sha256: `${sha256}=` })],
      ...[secretsWith({ sha256 }, { sha256: "" }), secretsWith({ sha256, expires_at: 1e11 })],
    ],
    "clients: billing: needs": [
      ...[billing(withoutSecrets), secretsWith()],
      billing({ ...withoutSecrets, jwks: { keys: [] } }),
    ],
    "clients: billing: must not have both": [billing({ jwks, jwks_uri: "https://a.example" })],
    "clients: billing: jwks_uri": clientsWith("jwks_uri", ["http://a.example", "jwks"]),
    "clients: billing: jwks has a private": keyNames.map((name) =>
      billing({ jwks: { keys: [publicJwk, { ...publicJwk, [name]: "" }] } }),
    ),
    "clients: billing: claims": claimNames.map((name) => billing({ claims: { a: 1, [name]: 1 } })),
    "clients: billing: token_endpoint_auth_signing_alg": [
      ...clientsWith("token_endpoint_auth_signing_alg", ["HS256", "none"]),
    ],
    "clients: billing: access_token_lifetime_seconds": [
      ...clientsWith("access_token_lifetime_seconds", [1_209_601, 0, -1, 0.5, "3600", undefined]),
    ],
  };
  for (const [field, all] of Object.entries(refused))
    for (const changes of all)
      test(`${titleOf(changes)} → ${field} is named`, async () => {
        const message = await outcome(idp(changes));
        expect(message).toStartWith(`config.ts: ${field}`);
        expect(message).not.toContain("hunter2");
      });

  test("a database that is not there → host and port are named, the password is not", async () => {
    const at = { databaseUrl: "postgres://root:hunter2@127.0.0.1:9/a", databaseWaitSeconds: 0 };
    const message = await outcome(idp(at));
    expect(message).toMatch(/^Cannot use PostgreSQL at 127\.0\.0\.1:9: .+ DATABASE_URL\.$/);
    expect(message).not.toContain("hunter2");
  });
});

describe("what a person makes", () => {
  test.concurrent(
    "bun run secret → 32 random bytes in base64url, and the hash to paste",
    async () => {
      const program = new Program([process.execPath, "run", "secret"], root);
      expect(await program.ended()).toBe(0);
      const [, secret, hash] = /^secret: ([\w-]{43})\nsha256: (\S+)\n$/.exec(program.stdout) ?? [];
      expect(hash).toBe(new Bun.CryptoHasher("sha256").update(secret!).digest("base64"));
    },
  );

  test.concurrent(
    "client.ts --new-key → a private file, a public JWK to paste; never overwritten",
    async () => {
      const cwd = temporaryDirectory();
      const make = () => launch("client", { cwd, arguments: ["--new-key"] });
      const made = make();
      expect([await made.ended(), made.stderr]).toEqual([0, ""]);
      const publicKey = JSON.parse(made.stdout);
      expect(Object.keys(publicKey).toSorted()).toEqual(["alg", "crv", "kid", "kty", "x", "y"]);
      const keyFile = join(cwd, "keys/client.jwk");
      const before = readFileSync(keyFile, "utf8");
      expect(JSON.parse(before)).toEqual({ ...publicKey, d: expect.any(String) });
      expect([modeOf(keyFile), modeOf(join(cwd, "keys"))]).toEqual(["600", "700"]);
      expect(await lastWords(make())).toContain("keys/client.jwk");
      expect(readFileSync(keyFile, "utf8")).toBe(before);
      const { client_secrets: _, ...registration } = authorizationServer.clients[0]!;
      const issuer = await idp({ clients: [{ ...registration, jwks: { keys: [publicKey] } }] });
      const { token_type } = await tokenSource(issuer.url, { keyFile }).accessToken();
      expect(token_type).toBe("Bearer");
    },
  );

  const oldBun = process.env["OLD_BUN"];
  const why = oldBun ? "" : " (skipped: OLD_BUN names no program of an earlier version)";
  test.skipIf(!oldBun)(`a Bun that is too old → one line from each program${why}`, async () => {
    for (const program of ["config", "idp", "api", "client"]) {
      const old = new Program([oldBun!, "run", join(root, `${program}.ts`)], temporaryDirectory());
      expect(await lastWords(old)).toMatch(/needs Bun 1\.4\.5 or later; this is \d+\.\d+\.\d+\.$/);
    }
  });
});

// --- Certificates --------------------------------------------------------------------------------

const modeOf = (path: string) => (statSync(path).mode & 0o777).toString(8);
const read = (file: string) => readFileSync(file, "utf8");
const openssl = Bun.which("openssl")!;
const https = "https://127.0.0.1:0";

function runOpenssl(...words: string[]): string {
  const { success, stdout, stderr } = Bun.spawnSync([openssl, ...words]);
  if (!success) throw new Error(stderr.toString());
  return stdout.toString();
}

interface Making {
  names?: string;
  newkey?: string[];
  days?: number;
  /** Whether it may sign others. */
  ca?: boolean;
  /** The file of what signs it; without, it signs itself. */
  signer?: string;
}

/** A file with a key, its certificate, and that of the signer. */
function makePem({ names = "DNS:localhost,IP:127.0.0.1", days = 9, ...more }: Making = {}): string {
  const { newkey = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], ca = false, signer } = more;
  const file = join(temporaryDirectory(), "made.pem");
  const [key, request, extensions] = [`${file}.key`, `${file}.csr`, `${file}.ext`] as const;
  const subject = ["-subj", "/CN=made", "-keyout", key, "-out", request];
  runOpenssl("req", "-new", "-nodes", "-newkey", ...newkey, ...subject);
  const caText = ca ? "TRUE" : "FALSE";
  writeFileSync(extensions, `subjectAltName=${names}\nbasicConstraints=critical,CA:${caText}\n`);
  const by = signer ? ["-CA", signer, "-CAkey", signer, "-set_serial", "1"] : ["-signkey", key];
  const made = ["-in", request, "-days", `${days}`, "-extfile", extensions, "-out", file];
  runOpenssl("x509", "-req", ...made, ...by);
  writeFileSync(file, read(key) + read(file) + (signer ? read(signer) : ""));
  return file;
}

/** For TLS_CERT and TLS_KEY, which may be one file. */
const inFile = (file: string): Files => ({
  ...{ certificateFile: file, keyFile: file, developmentFile: "" },
});
const development = (developmentFile: string): Files => ({
  ...{ certificateFile: undefined, keyFile: undefined, developmentFile },
});

const untrusted = 60; // what curl says: CURLE_PEER_FAILED_VERIFICATION

/** The exit code of curl, which trusts the certificates in `ca` alone, and connects to `port`. */
async function curl(url: string, ca: string, port: number | undefined): Promise<number> {
  const connect = ["--connect-to", `::127.0.0.1:${port}`, "--noproxy", "*"];
  const words = ["curl", "--silent", "--output", "/dev/null", "--cacert", ca, ...connect, url];
  return await new Program(words, temporaryDirectory()).ended();
}

describe("development certificate", () => {
  const file = join(temporaryDirectory(), "new/localhost.pem");

  test("it is for this machine and for servers, signs nothing, and lasts 825 days", async () => {
    const running = await idp({ issuer: https, tls: development(file) });
    expect([modeOf(file), modeOf(join(file, ".."))]).toEqual(["600", "700"]);
    expect(readdirSync(join(file, ".."))).toEqual(["localhost.pem"]);
    const made = new X509Certificate(read(file));
    expect((Date.parse(made.validTo) - Date.parse(made.validFrom)) / 86_400_000).toBe(825);
    expect(made.publicKey.asymmetricKeyDetails).toEqual({ namedCurve: "prime256v1" });
    const names = ["basicConstraints", "keyUsage", "extendedKeyUsage", "subjectAltName"];
    const text = runOpenssl("x509", "-in", file, "-noout", "-ext", names.join());
    expect(new Set(text.trim().split(/ *\n */))).toEqual(
      new Set([
        ...["X509v3 Basic Constraints: critical", "CA:FALSE"],
        ...["X509v3 Key Usage: critical", "Digital Signature"],
        ...["X509v3 Extended Key Usage:", "TLS Web Server Authentication"],
        "X509v3 Subject Alternative Name:",
        "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1",
      ]),
    );
    const { port } = running.server;
    for (const host of ["localhost", "127.0.0.1", "[::1]"])
      expect([host, await curl(`https://${host}:${port}/health`, file, port)]).toEqual([host, 0]);
    expect(await curl(`https://other.example/health`, file, port)).toBe(untrusted);
    expect(await curl(`https://localhost:${port}/health`, makePem(), port)).toBe(untrusted);
    await running.stop();
  });

  test("a certificate that it signed for another name is refused, as one of an authority is not", async () => {
    const signers = { [file]: untrusted, [makePem({ ca: true })]: 0 };
    for (const [signer, code] of Object.entries(signers)) {
      const leaf = read(makePem({ names: "DNS:other.example", signer }));
      const tls = { key: leaf, cert: leaf };
      const server = Bun.serve({ port: 0, tls, fetch: () => new Response() });
      expect(await curl("https://other.example/", signer, server.port)).toBe(code);
      await server.stop(true);
    }
  });

  const there: [name: string, pem: () => string, outcome: "kept" | "replaced" | "refused"][] = [
    ["one that holds", () => read(makePem()), "kept"],
    ["an expired one", () => read(makePem({ days: -1 })), "replaced"],
    ["an authority", () => read(makePem({ ca: true })), "replaced"],
    ["an empty file", () => "", "refused"],
    ["garbage", () => "garbage", "refused"],
    ["one without its key", () => read(makePem()).replace(/^.*?(?=-----BEGIN C)/s, ""), "refused"],
    ["one with another's key", () => read(`${makePem()}.key`) + read(makePem()), "refused"],
  ];
  test.each(there)("where there is %s → %3$s", async (_, pem, expected) => {
    const developmentFile = join(temporaryDirectory(), "localhost.pem");
    const before = pem();
    writeFileSync(developmentFile, before);
    const words = await outcome(idp({ issuer: https, tls: development(developmentFile) }));
    const after = read(developmentFile);
    expect(after !== before).toBe(expected === "replaced");
    expect(readdirSync(join(developmentFile, ".."))).toEqual(["localhost.pem"]);
    if (expected === "refused")
      return expect(words).toMatch(/^\S+localhost\.pem is damaged\. Delete it, /);
    expect(words).toStartWith("starts: ");
    const { ca, validTo } = new X509Certificate(after);
    expect([ca, Date.parse(validTo) > Date.now()]).toEqual([false, true]);
  });

  /** For PATH: a directory with a shell script in place of the openssl program. */
  function withOpenssl(commands: string): string {
    const directory = temporaryDirectory();
    writeFileSync(join(directory, "openssl"), `#!/bin/sh\n${commands}\n`);
    chmodSync(join(directory, "openssl"), 0o755);
    return `${directory}:${process.env["PATH"]}`;
  }
  const env = { ISSUER: https, API_URL: https };
  const failing: [name: string, PATH: string, said: RegExp][] = [
    [
      "no openssl",
      temporaryDirectory(),
      /^The program openssl is missing: install it, set TLS_CERT/,
    ],
    [
      "an openssl that fails",
      withOpenssl("exit 1"),
      /^The program openssl failed: .*use http on a/,
    ],
  ];
  test.concurrent.each(failing)(
    "%s → one line with the ways on, no file",
    async (_, PATH, said) => {
      const cwd = temporaryDirectory();
      expect(await lastWords(launch("idp", { cwd, env: { ...env, PATH } }))).toMatch(said);
      expect(readdirSync(cwd, { recursive: true }).filter((name) => name !== "keys")).toEqual([]);
    },
  );

  test.concurrent("servers that start at once make one, and a later start keeps it", async () => {
    const cwd = temporaryDirectory();
    const programs = [launch("idp", { cwd, env }), launch("api", { cwd, env })];
    const urls = await Promise.all([...programs, launch("idp", { cwd, env })].map(urlOf));
    const made = join(cwd, "keys/localhost.pem");
    for (const url of urls)
      expect(await curl(`${url}/nothing`, made, Number(new URL(url).port))).toBe(0);
    const files = readdirSync(join(cwd, "keys")).filter((name) => !name.startsWith("keys.db"));
    expect(files).toEqual(["localhost.pem"]);
    expect([modeOf(made), modeOf(join(cwd, "keys"))]).toEqual(["600", "700"]);
    const before = read(made);
    await urlOf(launch("api", { cwd, env: { ...env, PATH: temporaryDirectory() } }));
    expect(read(made)).toBe(before);
  });

  test.concurrent(
    "one that another program makes meanwhile stays; drafts are private",
    async () => {
      const cwd = temporaryDirectory();
      const winner = makePem();
      const PATH = withOpenssl(`cp '${winner}' keys/localhost.pem
      for last; do :; done
      stat -c %a keys "$last" > modes
      exec ${openssl} "$@"`);
      await urlOf(launch("idp", { cwd, env: { ...env, PATH } }));
      expect(read(join(cwd, "modes"))).toBe("700\n600\n");
      expect(read(join(cwd, "keys/localhost.pem"))).toBe(read(winner));
    },
  );
});

describe("own certificate", async () => {
  const rsaFile = makePem({ newkey: ["rsa:2048"] });
  const rsa = await idp({ issuer: https, tls: inFile(rsaFile) });
  afterAll(() => rsa.stop());
  const damaged = join(temporaryDirectory(), "damaged.pem");
  writeFileSync(damaged, read(rsaFile).replace("CERTIFICATE-----\nMII", "CERTIFICATE-----\nAAA"));
  const pair = /^TLS_CERT and TLS_KEY must be a certificate and its key/;
  const rows: [name: string, changes: Partial<Files>, said: RegExp][] = [
    ["TLS_CERT not there", { certificateFile: "/nowhere.pem" }, /^TLS_CERT must .*\/nowhere\.pem/],
    ["TLS_KEY not there", { keyFile: "/nowhere.pem" }, /^TLS_KEY must .*\/nowhere\.pem/],
    ["TLS_CERT not set", { certificateFile: undefined }, /^TLS_CERT must name a readable file/],
    ["TLS_KEY not set", { keyFile: undefined }, /^TLS_KEY must name a readable file/],
    ["TLS_CERT damaged", { certificateFile: damaged }, pair],
    ["TLS_CERT no PEM", { certificateFile: import.meta.path }, pair],
    ["TLS_KEY no PEM", { keyFile: import.meta.path }, pair],
    ["TLS_KEY of another", { keyFile: makePem() }, pair],
  ];
  test.each(rows)("%s → refused", async (_, changes, said) => {
    const tls = { ...inFile(rsaFile), ...changes };
    expect(await outcome(idp({ issuer: https, tls }))).toMatch(said);
    expect(await outcome(api(https, { resource: https, tls }))).toMatch(said);
  });

  test("https on a public host needs a certificate or a proxy; a proxy goes first", async () => {
    const issuer = "https://auth.example.com";
    const none = await outcome(idp({ issuer, tls: development("unused.pem") }));
    const ways = "TLS_CERT and TLS_KEY, or ISSUER_LISTEN behind a proxy that ends TLS";
    expect(none).toBe(`${issuer} needs ${ways}.`);
    const half = { ...development("unused.pem"), keyFile: rsaFile };
    expect(await outcome(idp({ issuer, tls: half }))).toStartWith("TLS_CERT must name");
    const behind = await idp({ issuer, tls: inFile(rsaFile), listen: "127.0.0.1:0" });
    expect((await send(`http://127.0.0.1:${behind.server.port}/health`)).status).toBe(200);
    await behind.stop();
  });

  const suites: [version: string, suite: string, isTaken: boolean][] = [
    ["-tls1_3", "DEFAULT", true],
    ["-tls1_2", "ECDHE-RSA-AES128-GCM-SHA256", true],
    ["-tls1_2", "ECDHE-RSA-AES256-GCM-SHA384", true],
    ["-tls1_2", "ECDHE-RSA-CHACHA20-POLY1305", true],
    ["-tls1_2", "AES128-GCM-SHA256", false], // no forward secrecy
    ["-tls1_2", "AES256-GCM-SHA384", false],
    ["-tls1_2", "ECDHE-RSA-AES128-SHA", false], // no AEAD
    ["-tls1_1", "DEFAULT@SECLEVEL=0", false],
  ];
  test.each(suites)("RFC 9325 §4.1, RFC 9325 §4.2: %s, %s → taken: %p", async (...row) => {
    const [version, suite, isTaken] = row;
    const to = ["-connect", `127.0.0.1:${rsa.server.port}`, version, "-cipher", suite];
    const program = new Program([openssl, "s_client", ...to], temporaryDirectory());
    expect([(await program.ended()) === 0, !/Cipher is \(NONE\)/.test(program.stdout)]).toEqual([
      ...[isTaken, isTaken],
    ]);
  });
});

describe("trust", async () => {
  const own = inFile(makePem({ names: "IP:127.0.0.1,IP:0.0.0.0" }));
  const issuer = await idp({ issuer: https, tls: own });
  const asked = async (tls: Files, url = issuer.url) =>
    await tokenSource(url, { tls })
      .accessToken()
      .catch(({ message }: Error) => message);

  test("on this machine the certificate in use here is trusted, and no other", async () => {
    const issued = expect.objectContaining({ token_type: "Bearer" });
    expect(await asked(own)).toEqual(issued);
    expect(await asked(development(own.certificateFile!))).toEqual(issued);
    const hint = /\(Start all programs in one directory, or with the same TLS_CERT\.\)$/;
    expect(await asked(inFile(makePem()))).toMatch(hint);
  });

  test("it is not trusted for another host", async () => {
    const said = await asked(own, issuer.url.replace("127.0.0.1", "0.0.0.0"));
    expect(said).toMatch(/^Discovery failed at https:\/\/0\.0\.0\.0.*NODE_EXTRA_CA_CERTS/);
  });

  test("who merely fetches makes no certificate and no directory", async () => {
    const directory = temporaryDirectory();
    expect(await asked(development(join(directory, "keys/localhost.pem")))).toContain("CERT");
    expect(readdirSync(directory)).toEqual([]);
  });
});

// --- Proxies of the environment ------------------------------------------------------------------

test("proxies of the environment see nothing of a loopback host, and are asked for another", async () => {
  let connections = 0;
  const socket = { open: (one: Bun.Socket) => void (connections++, one.end()), data: () => {} };
  const proxy = Bun.listen({ hostname: "127.0.0.1", port: 0, socket });
  const address = `http://127.0.0.1:${proxy.port}`;
  const names = ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"];
  const variables = Object.fromEntries(names.map((name) => [name, address]));
  const cwd = temporaryDirectory();
  const tls = development(join(cwd, "keys/localhost.pem"));
  const servers = await pair({ idp: { issuer: https, tls }, api: { tls } });
  const env = { ...variables, ISSUER: servers.idp.url, API_URL: servers.api.url };
  const local = launch("client", { cwd, env });
  expect([await local.ended(), connections]).toEqual([0, 0]);
  const far = { ...variables, ISSUER: "https://auth.example.com" };
  const hint = "(HTTPS_PROXY is set: check that proxy, or name the host in NO_PROXY.)";
  expect(await lastWords(launch("client", { cwd, env: far }))).toEndWith(hint);
  expect(connections).toBeGreaterThan(0);
  // The API fetches its keys in the same way.
  const before = connections;
  const remote = launch("api", { cwd, env: { ...env, API_URL: "http://127.0.0.1:0" } });
  const url = await urlOf(remote);
  await eventually("it has keys", async () => (await send(`${url}/health`)).status === 200);
  expect(connections).toBe(before);
  await remote.stop();
  proxy.stop(true);
});
