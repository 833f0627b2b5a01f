/** Mistakes in the configuration, where the programs listen, and which certificates they trust. */

import { afterAll, afterEach, describe, expect, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { chmodSync, copyFileSync, existsSync, readdirSync } from "node:fs";
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import * as configuration from "../config.ts";
import type { ClientRegistration } from "../config.ts";
import { type Changes, cleanUp, freeOrigin, freePort, launch, Program } from "./support.ts";
import { root, temporaryDirectory, withModule } from "./support.ts";

const { boundedFetch, isLoopback, listenOptions, requireOrigin } = configuration;
type Server = Bun.Server<undefined>;
type Environment = Record<string, string>;

const before = { ...process.env };
afterEach(() => {
  for (const name of Object.keys(process.env)) if (!(name in before)) delete process.env[name];
  Object.assign(process.env, before);
});
afterAll(cleanUp);

// --- Starting ------------------------------------------------------------------------------------

/** Starts a server in this process. Returns why it does not start, or "" if it serves. */
async function refusalOf(program: "idp" | "api", changes: Changes, env = {}): Promise<string> {
  Object.assign(process.env, env);
  return await withModule(program, changes, async (module: { start(): Promise<Server> }) => {
    try {
      const server = await module.start();
      const { status } = await fetch(`${server.url.origin}/.well-known/openid-configuration`);
      void server.stop(true);
      return status === (program === "idp" ? 200 : 404) ? "" : `status ${status}`;
    } catch (error) {
      return (error as Error).message;
    }
  });
}

type AuthorizationServer = typeof configuration.authorizationServer;
type SigningKeys = AuthorizationServer["signingKeys"];

/** The default configuration, on a free port and with a database of its own, but for `changes`. */
function idpWith(changes: Partial<AuthorizationServer> = {}): Promise<string> {
  const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
  return refusalOf("idp", {
    authorizationServer: { issuer: "http://127.0.0.1:0", databaseUrl, ...changes },
  });
}

/** What a program says that ends with exit code 1: one line, after what the client is doing. */
async function lastWords(program: Program): Promise<string> {
  const code = await program.ended();
  expect([code, program.stdout]).toEqual([1, ""]);
  expect(program.stderr).toMatch(/^(Requesting a token [^\n]+\n)?error: [^\n]+\n$/);
  return program.stderr.replace(/^(.+\n)?error: /, "").trimEnd();
}

const serving = { idp: /^authorization server: /m, api: /^API: /m };

/** Starts a server in a process, and waits until it serves. */
async function served(program: "idp" | "api", env: Environment, cwd = temporaryDirectory()) {
  const started = launch(program, { cwd, env });
  await started.printed(serving[program]);
  return started;
}

// --- Values --------------------------------------------------------------------------------------

const script = join(temporaryDirectory(), "print.ts");
writeFileSync(
  script,
  `import { authorizationServer, client, resourceServer } from "${root}/config.ts";
  console.log(JSON.stringify({ authorizationServer, client, resourceServer }));`,
);

async function valuesWith(env: Environment, cwd = temporaryDirectory()) {
  const program = new Program([process.execPath, script], { cwd, env });
  expect([await program.ended(), program.stderr]).toEqual([0, ""]);
  return JSON.parse(program.stdout) as Required<Changes>;
}

const asymmetric = [
  ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
  ...["EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
];

describe("values", () => {
  const delays = { pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 };
  const defaults = {
    authorizationServer: {
      issuer: "https://localhost:5001",
      scopes: [{ scope: "api1", description: "My API", resource: "https://localhost:6001" }],
      clients: [
        {
          client_id: "client",
          client_secrets: [
            { sha256: new Bun.CryptoHasher("sha256").update("secret").digest("base64") },
          ],
          grant_types: ["client_credentials"],
          scope: "api1",
          access_token_lifetime_seconds: 3_600,
        },
      ],
      acceptedAlgorithms: asymmetric,
      signingKeys: {
        algorithms: ["ES256"],
        rotationSeconds: 7_776_000,
        retentionSeconds: 1_209_600,
        ...delays,
      },
      databaseUrl: "sqlite://keys/keys.db",
      keyEncryptionSecret: "",
    },
    resourceServer: {
      resource: "https://localhost:6001",
      resource_name: "My API",
      issuer: "https://localhost:5001",
      acceptedAlgorithms: asymmetric,
      ...delays,
    },
    client: {
      issuer: "https://localhost:5001",
      resource: "https://localhost:6001",
      client_id: "client",
      client_secret: "secret",
      scope: "api1",
      dpop: false,
    },
  };

  test("without an environment: those of the quickstart", async () => {
    expect(await valuesWith({})).toEqual(defaults);
  });

  test("from the environment", async () => {
    const { authorizationServer, client, resourceServer } = await valuesWith({
      ISSUER: "https://auth.example",
      API_URL: "https://api.example",
      DATABASE_URL: "postgres://database.example/keys",
      KEY_ENCRYPTION_SECRET: "none",
      CLIENT_ID: "billing",
      CLIENT_SECRET: "hunter2",
      SCOPE: "read",
      CLIENT_KEY: "key.jwk",
      DPOP: "1",
    });
    const [issuer, resource] = ["https://auth.example", "https://api.example"];
    expect(authorizationServer).toEqual({
      ...defaults.authorizationServer,
      issuer,
      scopes: [{ scope: "api1", description: "My API", resource }],
      databaseUrl: "postgres://database.example/keys",
      keyEncryptionSecret: "none",
    });
    expect(resourceServer).toEqual({ ...defaults.resourceServer, issuer, resource });
    expect(client).toEqual({
      ...{ issuer, resource, client_id: "billing", client_secret: "hunter2", scope: "read" },
      keyFile: "key.jwk",
      dpop: true,
    });
  });

  test("any other DPOP binds: a slip must not give tokens that are not bound", async () => {
    for (const DPOP of ["true", "yes"]) {
      expect(await valuesWith({ DPOP })).toMatchObject({ client: { dpop: true } });
    }
  });

  test("empty variables and DPOP=0 count as not set", async () => {
    const names = ["ISSUER", "API_URL", "DATABASE_URL", "KEY_ENCRYPTION_SECRET", "CLIENT_ID"];
    const empty = Object.fromEntries(
      [...names, "CLIENT_SECRET", "SCOPE"].map((name) => [name, ""]),
    );
    expect(await valuesWith({ ...empty, DPOP: "0" })).toEqual(defaults);
  });

  test("from a file .env in the current directory", async () => {
    const cwd = temporaryDirectory();
    writeFileSync(join(cwd, ".env"), "ISSUER=https://auth.example\nSCOPE=read\n");
    const { authorizationServer, client } = await valuesWith({}, cwd);
    expect([authorizationServer.issuer, client.scope]).toEqual(["https://auth.example", "read"]);
  });
});

// --- Origins -------------------------------------------------------------------------------------

describe("origins", () => {
  const good = [
    ...["https://auth.example", "https://auth.example:8443", "https://localhost:5001"],
    ...["http://localhost:5001", "http://127.0.0.1", "http://127.1.2.3:8080"],
    ...["http://[::1]:5001", "https://[::1]", "https://192.0.2.1"],
  ];
  test.each(good)("%s is a bare origin", (value) => {
    expect(requireOrigin("ISSUER", value).origin).toBe(value);
  });

  const bad: [deviation: string, value: string][] = [
    ["slash at the end", "https://auth.example/"],
    ["path", "https://auth.example/tenant"],
    ["query", "https://auth.example?tenant"],
    ["fragment", "https://auth.example#"],
    ["userinfo", "https://user@auth.example"],
    ["upper case host", "https://Auth.example"],
    ["upper case scheme", "HTTPS://auth.example"],
    ["default port", "https://auth.example:443"],
    ["space at the end", "https://auth.example "],
    ["http on a public host", "http://auth.example"],
    ["http on a public address", "http://192.0.2.1"],
    ["http on a host that begins like a loopback one", "http://localhost.example"],
    ["http on a host that ends like a loopback one", "http://example.localhost"],
    ["http on a name that begins like a loopback address", "http://127.0.0.1.example"],
    ["http on all addresses", "http://0.0.0.0:5001"],
    ["http on all IPv6 addresses", "http://[::]:5001"],
    ["another scheme on loopback", "ftp://localhost"],
    ["no scheme", "auth.example"],
    ["no URL", "https://"],
    ["origin within another URL", "blob:https://auth.example"],
  ];
  test.each(bad)("%s → refused: %s", (_, value) => {
    const rule = "must be a bare https origin (http on loopback only)";
    expect(() => requireOrigin("NAME", value)).toThrow(new Error(`NAME ${rule}, not ${value}`));
  });

  const loopback: [host: string, is: boolean][] = [
    ["localhost", true],
    ["127.0.0.1", true],
    ["127.255.255.254", true],
    ["[::1]", true],
    ["128.0.0.1", false],
    ["localhost.example", false],
    ["notlocalhost", false],
    ["127.0.0.1.example", false],
    ["[::2]", false],
  ];
  test.each(loopback)("%s is loopback: %p", (host, is) => {
    expect(isLoopback(new URL(`https://${host}:5001`))).toBe(is);
  });

  const bare = "must be a bare https origin (http on loopback only), not";
  const wrong: ["idp" | "api" | "client", variable: string][] = [
    ["idp", "ISSUER"],
    ["api", "ISSUER"],
    ["client", "ISSUER"],
    ["api", "API_URL"],
    ["client", "API_URL"],
  ];
  test.concurrent.each(wrong)(
    "%s.ts with a slash at the end of %s → one line, exit code 1",
    async (program, variable) => {
      const env = { [variable]: "https://localhost:5001/" };
      const said = await lastWords(launch(program, { env }));
      expect(said).toBe(`${variable} ${bare} https://localhost:5001/`);
    },
  );

  test.concurrent("a value of several lines → still one line", async () => {
    const env = { ISSUER: "https://localhost:5001\r\n\n\tat a:1" };
    const said = await lastWords(launch("idp", { env }));
    expect(said).toBe(`ISSUER ${bare} https://localhost:5001 at a:1`);
  });
});

// --- Authorization server ------------------------------------------------------------------------

const sha256 = "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols="; // "secret"
const registration: ClientRegistration = {
  client_id: "billing",
  client_secrets: [{ sha256 }],
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 3_600,
};
const [first] = configuration.authorizationServer.clients;
const { signingKeys } = configuration.authorizationServer;
const resource = "https://localhost:6001";
const api1 = { scope: "api1", description: "My API", resource };

/** A second client, with what deviates from a valid registration. */
const billing = (changes: Record<string, unknown>): Partial<AuthorizationServer> => {
  const { client_secrets, ...rest } = { ...registration, ...changes } as ClientRegistration;
  const second = client_secrets ? { ...rest, client_secrets } : rest;
  return { scopes: [api1], clients: [first!, second] };
};
const keysWith = (changes: Partial<SigningKeys>) => ({
  signingKeys: { ...signingKeys, ...changes },
});
const secretOf = (bytes: number) => Buffer.alloc(bytes, 7).toString("base64url");
const { privateKey, publicKey } = await jose.generateKeyPair("ES256", { extractable: true });
const publicJwk = { ...(await jose.exportJWK(publicKey)), kid: "1" };
const privateJwk = { ...(await jose.exportJWK(privateKey)), kid: "2" };
/** Twice the sum of poll, max-age, refresh and cool-down. */
const twice = 2 * (10 + 60 + 300 + 5);

describe("authorization server", () => {
  const accepted: [name: string, changes: Partial<AuthorizationServer>][] = [
    ["the default", {}],
    ["two clients", billing({})],
    ["times of less than a second", keysWith({ maxAgeSeconds: 0.5, coolDownSeconds: 0.01 })],
    ["rotation of one second more than twice the caches", keysWith({ rotationSeconds: twice + 1 })],
    ["KEY_ENCRYPTION_SECRET of 32 bytes", { keyEncryptionSecret: secretOf(32) }],
    ["KEY_ENCRYPTION_SECRET with none", { keyEncryptionSecret: `${secretOf(32)},none` }],
    ["two algorithms", keysWith({ algorithms: ["Ed25519", "ES384"] })],
    ["DATABASE_URL without slashes", { databaseUrl: `sqlite:${temporaryDirectory()}/keys.db` }],
    [
      "client with public keys alone",
      billing({ client_secrets: undefined, jwks: { keys: [publicJwk] } }),
    ],
    [
      "client with two secrets",
      billing({ client_secrets: [{ sha256 }, { sha256, expires_at: 1 }] }),
    ],
    [
      "client with a secret that expires in the year 5138, the latest in seconds",
      billing({ client_secrets: [{ sha256, expires_at: 1e11 - 1 }] }),
    ],
    ["client with claims", billing({ claims: { tenant: "t1", ISS: "x", aud2: "y" } })],
    [
      "client with a lifetime as long as the retention",
      billing({ access_token_lifetime_seconds: 1_209_600 }),
    ],
    ["client with a lifetime of one second", billing({ access_token_lifetime_seconds: 1 })],
    [
      "client with two scopes",
      { ...billing({ scope: "api1 read" }), scopes: [api1, { ...api1, scope: "read" }] },
    ],
    ["scope at a resource that is a URN", { scopes: [{ ...api1, resource: "urn:example:api" }] }],
    [
      "scope at a resource with path and query",
      { scopes: [{ ...api1, resource: `${resource}/v1?a` }] },
    ],
  ];
  test.each(accepted)("%s → starts", async (_, changes) => {
    expect(await idpWith(changes)).toBe("");
  });

  type Refused = [name: string, changes: Partial<AuthorizationServer>, field: RegExp];
  const needsResource = (scope: string) =>
    new RegExp(`^config\\.ts: scopes: ${scope}: needs one resource URI$`);
  const unusableSecret =
    /^config\.ts: clients: billing: client_secrets need a SHA-256 in base64, and expires_at in seconds$/;
  const unusableTimes: [name: keyof SigningKeys, seconds: number, caches: number][] = [
    ["pollSeconds", 0, twice - 20],
    ["pollSeconds", -1, twice - 22],
    ["pollSeconds", NaN, NaN],
    ["maxAgeSeconds", 0, twice - 120],
    ["refreshSeconds", 0, twice - 600],
    ["coolDownSeconds", 0, twice - 10],
    ["retentionSeconds", 0, twice],
    ["retentionSeconds", -5, twice],
    ["retentionSeconds", NaN, twice],
    ["rotationSeconds", NaN, twice],
  ];
  const refused: Refused[] = [
    ["issuer with a path", { issuer: "http://127.0.0.1:0/tenant" }, /^ISSUER /],
    ["DATABASE_URL of MySQL", { databaseUrl: "mysql://127.0.0.1/keys" }, /DATABASE_URL/],
    ["DATABASE_URL a file URL", { databaseUrl: "file:keys.db" }, /DATABASE_URL/],
    ["DATABASE_URL a path", { databaseUrl: "keys/keys.db" }, /DATABASE_URL/],
    ["DATABASE_URL a scheme alone", { databaseUrl: "sqlite:" }, /DATABASE_URL/],
    ["DATABASE_URL with a scheme that ends the same", { databaseUrl: "xsqlite:a" }, /DATABASE_URL/],
    [
      "KEY_ENCRYPTION_SECRET of 31 bytes",
      { keyEncryptionSecret: secretOf(31) },
      /KEY_ENCRYPTION_SECRET/,
    ],
    [
      "KEY_ENCRYPTION_SECRET of 33 bytes",
      { keyEncryptionSecret: secretOf(33) },
      /KEY_ENCRYPTION_SECRET/,
    ],
    [
      "KEY_ENCRYPTION_SECRET with a second one too short",
      { keyEncryptionSecret: `${secretOf(32)},short` },
      /KEY_ENCRYPTION_SECRET/,
    ],
    [
      "rotation of exactly twice the caches",
      keysWith({ rotationSeconds: twice }),
      /signingKeys\.rotationSeconds/,
    ],
    [
      "rotation too short for the poll",
      keysWith({ rotationSeconds: twice + 2, pollSeconds: 11 }),
      /signingKeys\.rotationSeconds/,
    ],
    [
      "rotation too short for max-age",
      keysWith({ rotationSeconds: twice + 2, maxAgeSeconds: 61 }),
      /signingKeys\.rotationSeconds/,
    ],
    [
      "rotation too short for refresh",
      keysWith({ rotationSeconds: twice + 2, refreshSeconds: 301 }),
      /signingKeys\.rotationSeconds/,
    ],
    [
      "rotation too short for cool-down",
      keysWith({ rotationSeconds: twice + 2, coolDownSeconds: 6 }),
      /signingKeys\.rotationSeconds/,
    ],
    ...unusableTimes.map(([name, seconds, caches]): Refused => [
      `${name} ${seconds}`,
      keysWith({ [name]: seconds }),
      new RegExp(`signingKeys\\.rotationSeconds must be over ${caches}, each time over 0$`),
    ]),
    ["no algorithm", keysWith({ algorithms: [] }), /signingKeys\.algorithms/],
    ["algorithm HS256", keysWith({ algorithms: ["HS256"] }), /signingKeys\.algorithms/],
    ["algorithm none", keysWith({ algorithms: ["none"] }), /signingKeys\.algorithms/],
    ["algorithm in lower case", keysWith({ algorithms: ["es256"] }), /signingKeys\.algorithms/],
    [
      "second algorithm unknown",
      keysWith({ algorithms: ["ES256", "ES257"] }),
      /signingKeys\.algorithms/,
    ],
    [
      "scope at a resource that is relative",
      { scopes: [{ ...api1, resource: "/api" }] },
      needsResource("api1"),
    ],
    ["scope at no resource", { scopes: [{ ...api1, resource: "" }] }, needsResource("api1")],
    [
      "scope at a resource with a fragment",
      { scopes: [{ ...api1, resource: `${resource}/#a` }] },
      needsResource("api1"),
    ],
    [
      "second scope at a resource with an empty fragment",
      { scopes: [api1, { ...api1, scope: "read", resource: `${resource}#` }] },
      needsResource("read"),
    ],
    [
      "scope at two resources",
      { scopes: [api1, { ...api1, resource: "https://other.example" }] },
      needsResource("api1"),
    ],
    [
      "scope at two resources, another one between",
      { scopes: [{ ...api1, resource: "urn:a" }, { ...api1, scope: "read" }, api1] },
      needsResource("api1"),
    ],
    [
      "client registered twice",
      billing({ client_id: "client" }),
      /^config\.ts: clients: client: client_id is empty or there twice$/,
    ],
    [
      "client with an empty client_id",
      billing({ client_id: "" }),
      /^config\.ts: clients: : client_id is empty or there twice$/,
    ],
    ["client with an unknown scope", billing({ scope: "api2" }), /clients: billing: scope/],
    [
      "client with an unknown scope beside a known one",
      billing({ scope: "api1 api2" }),
      /clients: billing: scope/,
    ],
    ["client with an empty scope", billing({ scope: "" }), /clients: billing: scope/],
    [
      "client with two spaces in its scope",
      billing({ scope: "api1  api1" }),
      /clients: billing: scope/,
    ],
    [
      "client with a scope of the prototype",
      billing({ scope: "toString" }),
      /clients: billing: scope/,
    ],
    [
      "client with a secret in clear",
      billing({ client_secrets: [{ sha256: "secret" }] }),
      unusableSecret,
    ],
    [
      "client with a secret's hash in hex",
      billing({ client_secrets: [{ sha256: Buffer.from(sha256, "base64").toString("hex") }] }),
      unusableSecret,
    ],
    [
      "client with a secret's hash in base64url",
      billing({ client_secrets: [{ sha256: sha256.replace("+", "-") }] }),
      unusableSecret,
    ],
    [
      "client with a secret's hash without padding",
      billing({ client_secrets: [{ sha256: sha256.slice(0, -1) }] }),
      unusableSecret,
    ],
    [
      "client with a secret's hash and a character before",
      billing({ client_secrets: [{ sha256: `A${sha256}` }] }),
      unusableSecret,
    ],
    [
      "client with a secret's hash and a character after",
      billing({ client_secrets: [{ sha256: `${sha256}=` }] }),
      unusableSecret,
    ],
    [
      "client whose second secret is an empty text",
      billing({ client_secrets: [{ sha256 }, { sha256: "" }] }),
      unusableSecret,
    ],
    ...[1e11, 1e11 + 1, 4_102_444_800_000, Infinity].map((expires_at): Refused => [
      `client with a secret that expires at ${expires_at}, not in seconds`,
      billing({ client_secrets: [{ sha256, expires_at }] }),
      unusableSecret,
    ]),
    [
      "client whose second secret expires at a time in milliseconds",
      billing({ client_secrets: [{ sha256 }, { sha256, expires_at: 4_102_444_800_000 }] }),
      unusableSecret,
    ],
    [
      "client without secret or keys",
      billing({ client_secrets: undefined }),
      /clients: billing: needs client_secrets or jwks/,
    ],
    [
      "client with an empty list of secrets",
      billing({ client_secrets: [] }),
      /clients: billing: needs client_secrets or jwks/,
    ],
    [
      "client with an empty list of keys",
      billing({ client_secrets: undefined, jwks: { keys: [] } }),
      /clients: billing: needs client_secrets or jwks/,
    ],
    [
      "client with a private key",
      billing({ jwks: { keys: [privateJwk] } }),
      /clients: billing: jwks/,
    ],
    [
      "client with a private key after a public one",
      billing({ jwks: { keys: [publicJwk, privateJwk] } }),
      /clients: billing: jwks/,
    ],
    [
      "client with a symmetric key",
      billing({ jwks: { keys: [{ kty: "oct", k: "c2VjcmV0" }] } }),
      /clients: billing: jwks/,
    ],
    [
      "client with a lifetime of one second more than the retention",
      billing({ access_token_lifetime_seconds: 1_209_601 }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
    [
      "client with a lifetime of 0",
      billing({ access_token_lifetime_seconds: 0 }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
    [
      "client with a negative lifetime",
      billing({ access_token_lifetime_seconds: -1 }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
    [
      "client with half a second",
      billing({ access_token_lifetime_seconds: 0.5 }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
    [
      "client with a lifetime that is text",
      billing({ access_token_lifetime_seconds: "3600" }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
    [
      "client without a lifetime",
      billing({ access_token_lifetime_seconds: undefined }),
      /clients: billing: access_token_lifetime_seconds/,
    ],
  ];
  test.each(refused)("%s → refused", async (_, changes, field) => {
    expect(await idpWith(changes)).toMatch(field);
  });

  const reserved = "iss sub aud exp nbf iat jti client_id scope cnf".split(" ");
  test.each(reserved)("client with the reserved claim %s → refused", async (name) => {
    const claims = { tenant: "t1", [name]: 1 };
    expect(await idpWith(billing({ claims }))).toMatch(/clients: billing: claims/);
  });

  const privateMembers = "d p q dp dq qi oth k priv".split(" ");
  test.each(privateMembers)("client with the private member %s in jwks → refused", async (name) => {
    const jwks = { keys: [{ ...publicJwk, [name]: "" }] };
    expect(await idpWith(billing({ jwks }))).toMatch(/clients: billing: jwks/);
  });

  const mistakes: [name: string, env: Environment, changes: Changes | undefined, said: RegExp][] = [
    [
      "DATABASE_URL of MySQL",
      { DATABASE_URL: "mysql://root:hunter2@127.0.0.1/a" },
      undefined,
      /DATABASE_URL/,
    ],
    [
      "KEY_ENCRYPTION_SECRET too short",
      { KEY_ENCRYPTION_SECRET: "hunter2" },
      undefined,
      /KEY_ENCRYPTION_SECRET/,
    ],
    [
      "a database that is not there",
      { DATABASE_URL: "postgres://root:hunter2@127.0.0.1:9/a" },
      undefined,
      /^Cannot use the database: /,
    ],
    [
      "a database in a directory that is a file",
      { DATABASE_URL: `sqlite://${script}/keys.db` },
      undefined,
      /^Cannot use the database: /,
    ],
    [
      "a client's mistake",
      {},
      { authorizationServer: billing({ scope: "api2" }) },
      /^config\.ts: clients: billing: scope /,
    ],
    [
      "a rotation too short",
      {},
      { authorizationServer: keysWith({ rotationSeconds: 1 }) },
      /^config\.ts: signingKeys\.rotationSeconds .*750/,
    ],
  ];
  test.concurrent.each(mistakes)("%s → one line, exit code 1", async (_, env, changes, said) => {
    const options = { env: { ISSUER: freeOrigin(), ...env } };
    const words = await lastWords(launch("idp", changes ? { ...options, changes } : options));
    expect(words).toMatch(said);
    expect(words).not.toContain("hunter2");
  });

  test("a KEY_ENCRYPTION_SECRET that does not open the key → one line, exit code 1", async () => {
    const cwd = temporaryDirectory();
    const env = { ISSUER: freeOrigin(), KEY_ENCRYPTION_SECRET: secretOf(32) };
    await (await served("idp", env, cwd)).stop("SIGKILL");
    const other = Buffer.alloc(32, 8).toString("base64url");
    const second = launch("idp", { cwd, env: { ...env, KEY_ENCRYPTION_SECRET: other } });
    expect(await lastWords(second)).toMatch(/KEY_ENCRYPTION_SECRET lacks the secret of key \S+$/);
  });
});

// --- Listening -----------------------------------------------------------------------------------

describe("where to listen", () => {
  const plain: [listen: string, origin: string, hostname: string, port: number][] = [
    ["", "http://localhost:5001", "localhost", 5001],
    ["", "http://127.0.0.1", "127.0.0.1", 80],
    ["", "http://[::1]:5001", "[::1]", 5001],
    ["127.0.0.1:8080", "https://auth.example", "127.0.0.1", 8080],
    ["0.0.0.0:80", "https://auth.example", "0.0.0.0", 80],
    ["[::1]:8080", "https://auth.example:8443", "[::1]", 8080],
    ["proxy.example:8080", "https://auth.example", "proxy.example", 8080],
    ["127.0.0.1:8080", "http://127.0.0.1:5001", "127.0.0.1", 8080],
    ["localhost:80", "https://127.0.0.1:5001", "localhost", 80],
    ["127.1.2.3:8080", "https://[::1]:5001", "127.1.2.3", 8080],
    ["[::1]:8080", "https://localhost:5001", "[::1]", 8080],
  ];
  test.each(plain)("ISSUER_LISTEN=%p with %s → plain http at %s port %d", async (...row) => {
    const [listen, origin, hostname, port] = row;
    Object.assign(process.env, { ISSUER_LISTEN: listen, API_LISTEN: "127.0.0.1:1" });
    const options = await listenOptions("ISSUER", new URL(origin));
    expect(options).toEqual({ hostname, port, reusePort: false });
  });

  const malformed: [deviation: string, listen: string][] = [
    ["no port", "127.0.0.1"],
    ["an empty port", "127.0.0.1:"],
    ["port alone", "8080"],
    ["an empty host", ":8080"],
    ["port that is no number", "127.0.0.1:http"],
    ["port too large", "127.0.0.1:65536"],
    ["negative port", "127.0.0.1:-1"],
    ["path", "127.0.0.1:8080/"],
    ["path before the port", "127.0.0.1/:8080"],
    ["path after a backslash", "127.0.0.1\\:8080"],
    ["query", "127.0.0.1?:8080"],
    ["fragment", "127.0.0.1#:8080"],
    ["userinfo", "user@127.0.0.1:8080"],
    ["scheme", "http://127.0.0.1:8080"],
    ["IPv6 without brackets", "::1:8080"],
    ["space", "127.0.0.1 :8080"],
  ];
  // Who is on this machine alone, by its address, listens there alone.
  const beyond: [listen: string, origin: string][] = [
    ["0.0.0.0:8080", "https://localhost:5001"],
    ["0.0.0.0:8080", "http://127.0.0.1:5001"],
    ["[::]:8080", "http://[::1]:5001"],
    ["proxy.example:8080", "https://127.0.0.1"],
    ["localhost.example:8080", "http://localhost:5001"],
    ["127.0.0.1.example:8080", "http://localhost:5001"],
    ["128.0.0.1:8080", "http://localhost:5001"],
  ];
  for (const name of ["ISSUER", "API"] as const) {
    test.each(malformed)(`${name}_LISTEN with %s → refused: %s`, async (_, listen) => {
      process.env[`${name}_LISTEN`] = listen;
      for (const origin of ["https://auth.example", "https://localhost:5001"]) {
        const options = listenOptions(name, new URL(origin));
        expect(await options.catch(({ message }) => message)).toBe(`${name}_LISTEN: use host:port`);
      }
    });

    test.each(beyond)(`${name}_LISTEN=%s with %s → refused`, async (listen, origin) => {
      process.env[`${name}_LISTEN`] = listen;
      const options = listenOptions(name, new URL(origin));
      expect(await options.catch(({ message }) => message)).toBe(`${name}_LISTEN: use 127.0.0.1`);
    });
  }

  test("https on a public host, with TLS_CERT and TLS_KEY → https at that host", async () => {
    Object.assign(process.env, own);
    const tls = {
      cert: readFileSync(own.TLS_CERT, "utf8"),
      key: readFileSync(own.TLS_KEY, "utf8"),
    };
    const options = { hostname: "auth.example", port: 443, reusePort: false, tls };
    expect(await listenOptions("ISSUER", new URL("https://auth.example"))).toEqual(options);
    process.env["ISSUER_LISTEN"] = "127.0.0.1:8080"; // a proxy ends TLS, whatever else is set
    const behind = { hostname: "127.0.0.1", port: 8080, reusePort: false };
    expect(await listenOptions("ISSUER", new URL("https://auth.example"))).toEqual(behind);
  });

  const public_: ["idp" | "api", env: Environment, variable: string][] = [
    ["idp", { ISSUER: "https://auth.example" }, "ISSUER_LISTEN"],
    ["api", { API_URL: "https://api.example" }, "API_LISTEN"],
  ];
  test.concurrent.each(public_)(
    "%s.ts, https on a public host, neither certificate nor proxy → one line names both ways",
    async (program, env, variable) => {
      const said = await lastWords(launch(program, { env: { ...env, TLS_KEY: "key.pem" } }));
      expect(said).toBe(
        `${Object.values(env)[0]} needs TLS_CERT and TLS_KEY, or ${variable} behind a proxy`,
      );
    },
  );

  const unusable: ["idp" | "api", listen: string, said: string][] = [
    ["idp", "8080", "ISSUER_LISTEN: use host:port"],
    ["api", "8080", "API_LISTEN: use host:port"],
    ["idp", "0.0.0.0:8080", "ISSUER_LISTEN: use 127.0.0.1"],
    ["api", "0.0.0.0:8080", "API_LISTEN: use 127.0.0.1"],
  ];
  test.concurrent.each(unusable)(
    "%s.ts, listening at %s → one line, exit code 1",
    async (program, listen, said) => {
      const variable = program === "idp" ? "ISSUER_LISTEN" : "API_LISTEN";
      expect(await lastWords(launch(program, { env: { [variable]: listen } }))).toBe(said);
    },
  );

  test("behind a proxy → plain http, metadata and tokens name the public origins", async () => {
    const [issuer, resource] = ["https://auth.example", "https://api.example"];
    const at = { idp: `127.0.0.1:${freePort()}`, api: `127.0.0.1:${freePort()}` };
    const secret = "a secret that is long enough for a public issuer";
    const digest = new Bun.CryptoHasher("sha256").update(secret).digest("base64");
    const clients = [{ ...registration, client_secrets: [{ sha256: digest }] }];
    const env = { ISSUER: issuer, API_URL: resource, ISSUER_LISTEN: at.idp, API_LISTEN: at.api };
    const cwd = temporaryDirectory();
    const idp = launch("idp", { cwd, env, changes: { authorizationServer: { clients } } });
    await Promise.all([idp.printed(serving.idp), served("api", env, cwd)]);

    const metadata = await fetch(`http://${at.idp}/.well-known/openid-configuration`);
    expect(await metadata.json()).toMatchObject({
      issuer,
      jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
      token_endpoint: `${issuer}/connect/token`,
      protected_resources: [resource],
    });
    const other = await fetch(`http://${at.api}/.well-known/oauth-protected-resource`);
    expect(await other.json()).toMatchObject({ resource, authorization_servers: [issuer] });
    const headers = { authorization: `Basic ${btoa(`billing:${encodeURIComponent(secret)}`)}` };
    const body = new URLSearchParams({ grant_type: "client_credentials" });
    const answer = await fetch(`http://${at.idp}/connect/token`, { method: "POST", headers, body });
    const { access_token } = (await answer.json()) as { access_token: string };
    expect(jose.decodeJwt(access_token)).toMatchObject({ iss: issuer, aud: resource });
    expect(existsSync(join(cwd, "keys/localhost.pem"))).toBe(false);
  });

  test.each(["idp", "api"] as const)(
    "%s.ts, port in use → one line, exit code 1; with REUSE_PORT=1 two share it",
    async (program) => {
      const env = { ISSUER: freeOrigin(), API_URL: freeOrigin() };
      const alone = await served(program, env);
      const { port } = new URL(program === "idp" ? env.ISSUER : env.API_URL);
      for (const REUSE_PORT of ["", "1"]) {
        const second = launch(program, { env: { ...env, REUSE_PORT } });
        expect(await lastWords(second)).toBe(`Failed to start server. Is port ${port} in use?`);
      }
      await alone.stop("SIGKILL");
      const shared = { ...env, REUSE_PORT: "1" };
      await served(program, shared);
      await served(program, shared);
    },
  );
});

// --- Certificates --------------------------------------------------------------------------------

const openssl = Bun.which("openssl")!;

/** Makes a key and a certificate for localhost in two files of a new directory. */
function certificateFiles(addresses = "DNS:localhost,IP:127.0.0.1") {
  const cwd = temporaryDirectory();
  const files = { TLS_KEY: join(cwd, "key.pem"), TLS_CERT: join(cwd, "cert.pem") };
  const made = Bun.spawnSync([
    ...[openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"],
    ...["ec_paramgen_curve:P-256", "-subj", "/CN=own", "-addext", `subjectAltName=${addresses}`],
    ...["-keyout", files.TLS_KEY, "-out", files.TLS_CERT],
  ]);
  expect(made.exitCode).toBe(0);
  return files;
}

const own = certificateFiles();
const text = (...path: string[]) => readFileSync(join(...path), "utf8");
const modeOf = (...path: string[]) => (statSync(join(...path)).mode & 0o777).toString(8);
const secureOrigin = (host = "localhost") => `https://${host}:${freePort()}`;

/** The output of curl, which trusts the certificates in `ca` alone. */
async function curl(url: string, ca: string): Promise<string> {
  const program = new Program(["curl", "--silent", "--show-error", "--cacert", ca, url], {
    cwd: temporaryDirectory(),
    env: { PATH: process.env["PATH"] },
  });
  const code = await program.ended();
  return code === 0 ? program.stdout : program.stderr;
}

/** A directory with a shell script in place of the openssl program, for PATH. */
function fakeOpenssl(commands: string): string {
  const directory = temporaryDirectory();
  const file = join(directory, "openssl");
  writeFileSync(file, `#!/bin/sh\n${commands}\n`);
  chmodSync(file, 0o755);
  return `${directory}:${process.env["PATH"]}`;
}

describe("development certificate", () => {
  test("three programs that start at once make one, and trust it", async () => {
    const cwd = temporaryDirectory();
    const env = { ISSUER: secureOrigin(), API_URL: secureOrigin() };
    const idp = launch("idp", { cwd, env });
    const api = launch("api", { cwd, env });
    const client = launch("client", { cwd, env, arguments: ["--wait"] });
    expect([await client.ended(), client.stderr]).toEqual([
      0,
      `Requesting a token for client from ${env.ISSUER}\nCalling ${env.API_URL}/identity\n`,
    ]);
    expect([idp.stderr, api.stderr]).toEqual([
      `authorization server: ${env.ISSUER}\n`,
      `API: ${env.API_URL}\n`,
    ]);
    const files = readdirSync(join(cwd, "keys")).filter((name) => !name.startsWith("keys.db"));
    expect(files).toEqual(["localhost.pem"]);
    expect([modeOf(cwd, "keys"), modeOf(cwd, "keys/localhost.pem")]).toEqual(["700", "600"]);

    const pem = text(cwd, "keys/localhost.pem");
    expect(pem.match(/-----BEGIN [A-Z ]+-----/g)).toEqual([
      "-----BEGIN PRIVATE KEY-----",
      "-----BEGIN CERTIFICATE-----",
    ]);
    const certificate = new X509Certificate(pem);
    const names = "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1";
    expect([certificate.subject, certificate.subjectAltName]).toEqual(["CN=localhost", names]);
    const [from, to] = [certificate.validFrom, certificate.validTo].map((date) => Date.parse(date));
    expect((to! - from!) / 86_400_000).toBe(3650);
    expect(certificate.publicKey.asymmetricKeyDetails).toEqual({ namedCurve: "prime256v1" });

    const metadata = `${env.ISSUER}/.well-known/openid-configuration`;
    const known = await curl(metadata, join(cwd, "keys/localhost.pem"));
    expect(JSON.parse(known)).toMatchObject({ issuer: env.ISSUER });
    expect(await curl(metadata, own.TLS_CERT)).toContain("certificate");

    const other = launch("client", { env });
    expect(await other.ended()).toBe(1);
    expect(other.stderr.split("\n").slice(1)).toEqual([
      `error: Discovery failed at ${metadata}: DEPTH_ZERO_SELF_SIGNED_CERT ` +
        "(Start all in one directory, or set TLS_CERT or NODE_EXTRA_CA_CERTS.)",
      "",
    ]);
    const NODE_EXTRA_CA_CERTS = join(cwd, "keys/localhost.pem");
    const trusting = launch("client", { env: { ...env, NODE_EXTRA_CA_CERTS } });
    expect([await trusting.ended(), trusting.stderr.match(/error.*/)?.[0]]).toEqual([0, undefined]);

    await idp.stop("SIGKILL");
    await served("idp", { ...env, PATH: temporaryDirectory() }, cwd);
    expect(text(cwd, "keys/localhost.pem")).toBe(pem);
  });

  test.each(["127.0.0.1", "[::1]"])("it holds for https://%s", async (host) => {
    const cwd = temporaryDirectory();
    const env = { ISSUER: secureOrigin(host), API_URL: secureOrigin(host) };
    await Promise.all([served("idp", env, cwd), served("api", env, cwd)]);
    const client = launch("client", { cwd, env });
    expect([await client.ended(), client.stderr.match(/error.*/)?.[0]]).toEqual([0, undefined]);
    const known = await curl(`${env.ISSUER}/health`, join(cwd, "keys/localhost.pem"));
    expect(known).toBe('{"status":"ok"}');
  });

  test("the file is private from the start, and another program's is not overwritten", async () => {
    const cwd = temporaryDirectory();
    const winner = `${text(own.TLS_KEY)}${text(own.TLS_CERT)}`;
    writeFileSync(join(cwd, "winner.pem"), winner);
    // While this program makes its certificate, another one finishes.
    const PATH = fakeOpenssl(
      `cp winner.pem keys/localhost.pem
      for last; do :; done
      stat -c %a keys "$last" > modes
      exec ${openssl} "$@"`,
    );
    const env = { ISSUER: secureOrigin(), PATH };
    await served("idp", env, cwd);
    expect(text(cwd, "modes")).toBe("700\n600\n");
    expect(text(cwd, "keys/localhost.pem")).toBe(winner);
    const files = readdirSync(join(cwd, "keys")).filter((name) => !name.startsWith("keys.db"));
    expect(files).toEqual(["localhost.pem"]);
    expect(await curl(`${env.ISSUER}/health`, own.TLS_CERT)).toBe('{"status":"ok"}');
  });

  const waysOn = "set TLS_CERT and TLS_KEY, or use http on a loopback host";
  const failing: [name: string, PATH: () => string, said: RegExp][] = [
    ["no openssl", () => temporaryDirectory(), /^openssl is missing: install it, /],
    ["openssl that fails", () => fakeOpenssl("exit 1"), /^openssl failed: /],
  ];
  test.each(failing)("%s → one line with the ways on, exit code 1", async (_, path, said) => {
    const cwd = temporaryDirectory();
    const words = await lastWords(launch("idp", { cwd, env: { PATH: path() } }));
    expect(words).toMatch(said);
    expect(words).toEndWith(waysOn);
    expect(readdirSync(join(cwd, "keys"))).toEqual([]);
  });

  test("the ways on without openssl: own certificate, or http on loopback", async () => {
    const PATH = temporaryDirectory();
    const cwd = temporaryDirectory();
    await served("idp", { PATH, ISSUER: secureOrigin(), ...own }, cwd);
    const env = { PATH, ISSUER: freeOrigin(), API_URL: freeOrigin() };
    await Promise.all([served("idp", env, cwd), served("api", env, cwd)]);
    const client = launch("client", { cwd, env });
    expect([await client.ended(), client.stderr.match(/error.*/)?.[0]]).toEqual([0, undefined]);
    expect(existsSync(join(cwd, "keys/localhost.pem"))).toBe(false);
  });
});

describe("own certificate", () => {
  test("TLS_CERT and TLS_KEY are used by all three on loopback", async () => {
    const cwd = temporaryDirectory();
    copyFileSync(own.TLS_CERT, join(cwd, "cert.pem"));
    copyFileSync(own.TLS_KEY, join(cwd, "key.pem"));
    const files = { TLS_CERT: "cert.pem", TLS_KEY: "key.pem" };
    const env = { ISSUER: secureOrigin(), API_URL: secureOrigin("127.0.0.1"), ...files };
    await Promise.all([served("idp", env, cwd), served("api", env, cwd)]);
    const client = launch("client", { cwd, env });
    expect([await client.ended(), client.stderr.match(/error.*/)?.[0]]).toEqual([0, undefined]);
    expect(await curl(`${env.ISSUER}/health`, own.TLS_CERT)).toBe('{"status":"ok"}');
    expect(existsSync(join(cwd, "keys/localhost.pem"))).toBe(false);
  });

  const garbage = join(temporaryDirectory(), "garbage.pem");
  writeFileSync(garbage, "garbage");
  const damaged = join(temporaryDirectory(), "damaged.pem");
  writeFileSync(damaged, text(own.TLS_CERT).replace("MII", "AAA"));
  const other = certificateFiles();
  const missing = "/nowhere/file.pem";
  const pair = /^TLS_CERT and TLS_KEY must be one pair in PEM: /;
  const rows: [name: string, env: Record<string, string | undefined>, said: RegExp][] = [
    ["TLS_CERT not there", { TLS_CERT: missing }, /^TLS_CERT must .*\/nowhere\/file\.pem/],
    ["TLS_KEY not there", { TLS_KEY: missing }, /^TLS_KEY must .*\/nowhere\/file\.pem/],
    ["TLS_KEY empty", { TLS_KEY: "" }, /^TLS_KEY must name a readable file/],
    ["TLS_KEY not set", { TLS_KEY: undefined }, /^TLS_KEY must name a readable file: .* open$/],
    ["TLS_CERT a directory", { TLS_CERT: "/" }, /^TLS_CERT must name a readable file/],
    ["TLS_CERT not in PEM", { TLS_CERT: garbage }, /^TLS_CERT .*PEM/],
    ["TLS_CERT damaged", { TLS_CERT: damaged }, pair],
    ["TLS_KEY not in PEM", { TLS_KEY: garbage }, /^TLS_.*KEY .*PEM/],
    ["TLS_KEY of another certificate", { TLS_KEY: other.TLS_KEY }, pair],
  ];
  for (const program of ["idp", "api"] as const) {
    test.concurrent.each(rows)(`${program}.ts, %s → one line, exit code 1`, async (...row) => {
      const [, env, said] = row;
      const servers = { ISSUER: secureOrigin(), API_URL: secureOrigin() };
      expect(await lastWords(launch(program, { env: { ...servers, ...own, ...env } }))).toMatch(
        said,
      );
    });
  }

  const atClient: [name: string, TLS_CERT: string][] = [
    ["not there", missing],
    ["not in PEM", garbage],
  ];
  test.concurrent.each(atClient)(
    "client.ts, TLS_CERT %s → the last line names it, exit code 1",
    async (_, TLS_CERT) => {
      const env = { ISSUER: secureOrigin(), ...own, TLS_CERT };
      const client = launch("client", { env });
      expect(await client.ended()).toBe(1);
      const [requesting, error, ...more] = client.stderr.split("\n");
      expect(requesting).toStartWith("Requesting a token ");
      expect(error).toMatch(/^error: Discovery failed .*TLS_CERT/);
      expect(more).toEqual([""]);
    },
  );
});

// --- Fetching ------------------------------------------------------------------------------------

describe("boundedFetch", () => {
  const chunks = async function* (count: number, bytes: number) {
    for (let left = count; left > 0; left--) yield new Uint8Array(bytes);
  };
  const gzip = { "content-encoding": "gzip" };
  const answers: Record<string, (request: Request) => Response> = {
    "/hello": () => new Response("hello", { status: 201, headers: { "x-note": "kept" } }),
    "/empty": () => new Response(null, { status: 204 }),
    "/chunks": () => new Response(chunks(4, 250)),
    "/longer": () => new Response(chunks(4, 251)),
    "/endless": () => new Response(chunks(Infinity, 1_000)),
    "/gzip": () => new Response(Bun.gzipSync(new Uint8Array(1_000)), { headers: gzip }),
    "/bomb": () => new Response(Bun.gzipSync(new Uint8Array(10_000_000)), { headers: gzip }),
    "/redirect": () => Response.redirect("/hello", 302),
  };
  const asked = (request: Request) => new Response(`${request.headers.get("accept-encoding")}`);
  const handler = (request: Request) => (answers[new URL(request.url).pathname] ?? asked)(request);
  const server = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: handler });
  const tls = { key: text(own.TLS_KEY), cert: text(own.TLS_CERT) };
  const secure = Bun.serve({ hostname: "127.0.0.1", port: 0, tls, fetch: handler });
  afterAll(() => Promise.all([server.stop(true), secure.stop(true)]));

  const fetched = async (path: string, origin = server.url.origin, bytes = 1_000) =>
    await boundedFetch(origin + path, {}, bytes);

  test("the answer has its status, fields and body", async () => {
    const answer = await fetched("/hello");
    expect([answer.status, answer.headers.get("x-note")]).toEqual([201, "kept"]);
    expect(await answer.text()).toBe("hello");
  });

  test("an answer without a body", async () => {
    const answer = await fetched("/empty");
    expect([answer.status, answer.body]).toEqual([204, null]);
  });

  test("exactly as many bytes as allowed", async () => {
    const bytes = await (await fetched("/chunks")).bytes();
    expect(bytes).toEqual(new Uint8Array(1_000));
  });

  test("what comes compressed is not unpacked, for a little may unpack to very much", async () => {
    const [small, bomb] = await Promise.all([
      fetched("/gzip"),
      fetched("/bomb", undefined, 20_000),
    ]);
    expect(await small!.bytes()).toEqual(Bun.gzipSync(new Uint8Array(1_000)));
    expect(await bomb!.bytes()).toEqual(Bun.gzipSync(new Uint8Array(10_000_000)));
  });

  test("nothing compressed is asked for", async () => {
    expect(await (await fetched("/accept-encoding")).text()).toBe("null");
  });

  test.each(["/longer", "/endless"])("%s: more bytes than allowed → throws", async (path) => {
    await expect(fetched(path)).rejects.toThrow("the answer is longer than 1000 bytes");
  });

  test("a redirect is not followed", async () => {
    const answer = await fetched("/redirect");
    expect([answer.status, answer.headers.get("location")]).toEqual([302, "/hello"]);
  });

  test("method, fields, body and signal are those of the caller", async () => {
    const seen = Promise.withResolvers<Request>();
    const other = Bun.serve({
      ...{ hostname: "127.0.0.1", port: 0 },
      fetch: async (request) => {
        seen.resolve(new Request(request, { body: await request.text() }));
        return new Response();
      },
    });
    const init = { method: "PUT", headers: { "x-note": "sent" }, body: "hello" };
    await boundedFetch(other.url.origin, init, 0);
    const { method, headers, body } = await seen.promise;
    expect([method, headers.get("x-note"), await new Response(body).text()]).toEqual([
      ...["PUT", "sent", "hello"],
    ]);
    const aborted = boundedFetch(other.url.origin, { signal: AbortSignal.abort() }, 0);
    await expect(aborted).rejects.toThrow("aborted");
    await other.stop(true);
  });

  test("https on loopback: the certificate in use here is trusted, another is not", async () => {
    Object.assign(process.env, own);
    expect((await fetched("/hello", secure.url.origin)).status).toBe(201);
    Object.assign(process.env, certificateFiles());
    await expect(fetched("/hello", secure.url.origin)).rejects.toThrow("certificate");
  });

  test("https on a host that is not loopback: the certificate in use here is not trusted", async () => {
    const files = certificateFiles("IP:0.0.0.0,IP:127.0.0.1");
    Object.assign(process.env, files);
    const tls = { key: text(files.TLS_KEY), cert: text(files.TLS_CERT) };
    const other = Bun.serve({ hostname: "0.0.0.0", port: 0, tls, fetch: handler });
    expect((await fetched("/hello", `https://127.0.0.1:${other.port}`)).status).toBe(201);
    const elsewhere = fetched("/hello", `https://0.0.0.0:${other.port}`);
    await expect(elsewhere).rejects.toThrow("self signed certificate");
    await other.stop(true);
  });
});
