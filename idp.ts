/**
 * The authorization server (RFC 6749 §1.1): gives a registered client an access token.
 *
 *   POST /connect/token                           client credentials grant, RFC 6749 §4.4
 *   GET  /.well-known/openid-configuration        metadata, RFC 8414
 *   GET  /.well-known/oauth-authorization-server  the same
 *   GET  /.well-known/openid-configuration/jwks   public keys, RFC 7517
 *   GET  /health
 *
 * Clients authenticate with a secret or a key (RFC 7523); tokens are JWTs (RFC 9068), bound to a key
 * of the client if it sends a proof (RFC 9449). No users, sessions, refresh tokens or introspection.
 * Run: bun run idp.ts
 */

import { SQL } from "bun";
import { hash, timingSafeEqual } from "node:crypto";
import { closeSync, mkdirSync, openSync } from "node:fs";
import { STATUS_CODES } from "node:http";
import { dirname } from "node:path";
import * as jose from "jose";
import { authorizationServer, type ClientRegistration, fail, isLoopback } from "./config.ts";
import { lifecycle, listenOptions, log, requireOrigin, stopOnSignal } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

type Configuration = typeof authorizationServer;
type Server = Awaited<ReturnType<typeof prepare>>;
type Client = ReturnType<typeof register>;
type Form = Map<string, string>;
type Entry = Record<string, unknown>;

// prettier-ignore
const parameterNames = ["grant_type", "scope", "resource", "client_id", "client_secret",
  "client_assertion", "client_assertion_type"];
const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
const leewaySeconds = 30;
const assertionMaxSeconds = 600;
const proofMaxAgeSeconds = 90;
const databaseTimeoutSeconds = 2;
const clockStepSeconds = 300;
const strongSecretLength = 32;
const reservedClaims = "iss sub aud exp nbf iat jti client_id scope cnf".split(" ");
const privateMembers = "d p q dp dq qi oth k priv".split(" ");
const publicMembers = "kty crv x y n e pub".split(" ");
const unmatchedSecrets = [{ sha256: Buffer.alloc(32), expires_at: 0 }];
const noStore = { "cache-control": "no-store", pragma: "no-cache" }; // RFC 6749 §5.1
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const secondsNow = () => Math.floor(Date.now() / 1000);

// --- Errors --------------------------------------------------------------------------------------

/** RFC 6749 §5.2: each code with its status and a constant text. The reason goes to the log. */
const errors = {
  invalid_request: [400, "The request is malformed, repeats a parameter or authenticates twice."],
  invalid_client: [401, "Client authentication failed. The log of the server has the reason."],
  unauthorized_client: [400, "The client is not registered for this grant type."],
  unsupported_grant_type: [400, "The only grant type here is client_credentials."],
  invalid_scope: [400, "The scope is unknown, not granted, or belongs to several resources."],
  invalid_target: [400, "The resource is unknown, repeated, or one without a granted scope."],
  invalid_dpop_proof: [400, "The DPoP proof is missing or not valid."],
} as const;

class Refusal extends Error {
  readonly code: keyof typeof errors;

  constructor(code: keyof typeof errors, reason: string) {
    super(reason);
    this.code = code;
  }
}

/** Not the caller's fault, and over soon: 503. */
class Unavailable extends Error {}

// --- Token endpoint ------------------------------------------------------------------------------

/** Answers a token request (RFC 6749 §4.4). Throws for faults of this server only. */
async function token(server: Server, request: Request, address: string): Promise<Response> {
  const started = performance.now();
  const entry: Entry = { address };
  try {
    const form = await step("invalid_request", readForm(request));
    const client = await step("invalid_client", authenticate(server, request, form, entry));
    checkGrantType(client, form.get("grant_type"));
    const jkt = await step("invalid_dpop_proof", proofThumbprint(server, request, client));
    const { resource, scope } = grantScope(server, client, form);
    const { answer, ...issued } = await issue(server, client, resource, scope, jkt);
    log("token issued", { ...entry, ...issued, milliseconds: performance.now() - started });
    return Response.json(answer, { headers: noStore });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const { code, message: reason } = error;
    const milliseconds = performance.now() - started;
    log("token refused", { ...entry, error: code, reason, milliseconds });
    const [status, error_description] = errors[code];
    const headers = status === 401 ? { ...noStore, ...server.challenge } : noStore;
    return Response.json({ error: code, error_description }, { status, headers });
  }
}

/** What a step finds wrong with the request is an Error, and refused with the code of the step. */
async function step<T>(code: keyof typeof errors, result: Promise<T>): Promise<T> {
  return await result.catch((error: Error) => {
    if (error instanceof Refusal || error instanceof Unavailable) throw error;
    throw new Refusal(code, error.message);
  });
}

/** The parameters that this server reads; an empty one counts as absent (RFC 6749 §3.2). */
async function readForm(request: Request): Promise<Form> {
  const mediaType = request.headers.get("content-type")?.split(";")[0]?.trim().toLowerCase();
  if (mediaType !== "application/x-www-form-urlencoded") throw new Error("not a form");
  const body = utf8.decode(await request.bytes());
  // Throws, unlike the parser below, for malformed percent-encoding and for what is not UTF-8.
  if (decodeURIComponent(body).includes("\0")) throw new Error("NUL in the form");
  const form: Form = new Map();
  for (const [name, value] of new URLSearchParams(body)) {
    if (!parameterNames.includes(name)) continue;
    const other = form.get(name);
    if (other !== undefined && name !== "resource") throw new Error(`${name} is repeated`);
    // Several resources become one with a space in it: unknown, hence invalid_target (RFC 8707 §2).
    form.set(name, other === undefined ? value : `${other} ${value}`);
  }
  for (const [name, value] of form) if (!value) form.delete(name);
  return form;
}

function checkGrantType(client: Client, grantType: string | undefined): void {
  if (!grantType) throw new Refusal("invalid_request", "no grant_type");
  const known = grantType === "client_credentials";
  if (!known) throw new Refusal("unsupported_grant_type", "another grant type");
  const registered = client.grant_types.includes(grantType);
  if (!registered) throw new Refusal("unauthorized_client", "not registered for the grant type");
}

/** One resource and scopes of it (RFC 6749 §3.3, RFC 8707 §2.2): all that was asked for, or none. */
function grantScope({ resourceOf }: Server, { scopesAt }: Client, form: Form) {
  const named = form.get("resource");
  const unknown = named !== undefined && !scopesAt.has(named);
  if (unknown) throw new Refusal("invalid_target", "resource unknown or without a scope");
  const requested = form.get("scope")?.split(" ");
  // Choice (§3.3): without a scope, all that the client has at the resource; it must be only one.
  const only = scopesAt.size === 1 ? scopesAt.keys().next().value : undefined;
  const resource = named ?? (requested ? resourceOf.get(requested[0]!) : only);
  const granted = scopesAt.get(resource ?? "");
  const scopes = new Set(requested ?? granted);
  if (resource && granted && scopes.isSubsetOf(granted)) {
    return { resource, scope: [...scopes].join(" ") };
  }
  throw new Refusal("invalid_scope", "scope unknown, not granted or of several resources");
}

/** The answer (RFC 6749 §5.1) with a signed access token (RFC 9068 §2), and what the log tells. */
async function issue(server: Server, client: Client, aud: string, scope: string, jkt?: string) {
  const { client_id } = client;
  const iat = secondsNow();
  const key = server.keys.signingKey(iat);
  if (!key) throw new Unavailable("no key to sign with");
  const { alg, kid, privateKey, removed_at } = key;
  const exp = Math.min(iat + client.access_token_lifetime_seconds, removed_at);
  const jti = crypto.randomUUID();
  const subject = { iss: server.configuration.issuer, sub: client_id, aud, client_id, scope };
  const claims = { ...subject, iat, nbf: iat, exp, jti, ...(jkt && { cnf: { jkt } }) };
  const access_token = await new jose.SignJWT({ ...claims, ...client.claims })
    .setProtectedHeader({ alg, kid, typ: "at+jwt" })
    .sign(privateKey);
  const token_type = jkt ? "DPoP" : "Bearer";
  return { answer: { access_token, token_type, expires_in: exp - iat, scope }, scope, kid, jti };
}

// --- Client authentication -----------------------------------------------------------------------

/** By exactly one method (RFC 6749 §2.3). Returns the client; what else it throws: invalid_client. */
async function authenticate(server: Server, request: Request, form: Form, entry: Entry) {
  const authorization = request.headers.get("authorization");
  const assertion = form.get("client_assertion") ?? form.get("client_assertion_type");
  const methods = [authorization !== null, form.get("client_secret"), assertion].filter(Boolean);
  // Two Authorization fields arrive as one, joined by a comma.
  if (methods.length > 1 || /, *[\w-]+ /.test(authorization ?? "")) {
    throw new Refusal("invalid_request", "more than one way of client authentication");
  }
  const named = form.get("client_id");
  const [client_id = "", client_secret = ""] =
    authorization !== null
      ? basicCredentials(authorization)
      : [assertion ? subjectOf(form) : named, form.get("client_secret")];
  entry["client_id"] = client_id.slice(0, 200);
  if (named !== undefined && named !== client_id) {
    throw new Refusal("invalid_request", "client_id contradicts the credentials");
  }
  const client = server.clients.get(client_id);
  if (assertion) return await verifyAssertion(server, client, assertion);
  return verifySecret(server, client, client_secret);
}

/** RFC 6749 §2.3.1: id and secret are form-encoded within the credentials of RFC 7617 §2. */
function basicCredentials(authorization: string): string[] {
  const [, encoded] = /^Basic +(\S+)$/i.exec(authorization) ?? [];
  if (!encoded) throw new Error("no Basic credentials in Authorization");
  const [, ...halves] = /^([^:]*):(.*)$/s.exec(utf8.decode(Uint8Array.fromBase64(encoded))) ?? [];
  return halves.map((half) => decodeURIComponent(half.replaceAll("+", " ")));
}

/** RFC 7523 §2.2. Whom an assertion names, before it is verified. */
function subjectOf(form: Form): string {
  const known = form.get("client_assertion_type") === jwtBearer;
  if (!known) throw new Error("client_assertion_type absent or unknown");
  return `${jose.decodeJwt(form.get("client_assertion") ?? "").sub}`;
}

/** Compares by SHA-256, in constant time, and does so for unknown clients too. */
function verifySecret(server: Server, client: Client | undefined, client_secret: string): Client {
  if (!client_secret) throw new Error("no credentials");
  const tooShort = server.strongSecretsOnly && client_secret.length < strongSecretLength;
  if (tooShort) throw new Error("secret too short for a public issuer");
  const presented = hash("sha256", client_secret, "buffer");
  const secrets = client?.secrets ?? unmatchedSecrets;
  const matching = secrets.filter(({ sha256 }) => timingSafeEqual(sha256, presented));
  if (client && matching.some(({ expires_at }) => expires_at > secondsNow())) return client;
  throw new Error(matching.length ? "expired secret" : client ? "wrong secret" : "unknown client");
}

/** private_key_jwt: RFC 7523 §3, and its audience as rfc7523bis has it. */
async function verifyAssertion(server: Server, client: Client | undefined, assertion: string) {
  if (!client?.jwkSet) throw new Error("client unknown or without keys");
  const { client_id, jwkSet, jwks } = client;
  const { payload, protectedHeader } = await jose.jwtVerify(assertion, jwkSet, {
    algorithms: server.configuration.acceptedAlgorithms,
    issuer: client_id,
    subject: client_id,
    requiredClaims: ["exp"],
    clockTolerance: leewaySeconds,
  });
  const { aud, exp = 0, iat = 0, jti } = payload;
  const { crit, kid } = protectedHeader;
  if (crit) throw new Error("crit in the header");
  if (!kid && jwks?.keys.length !== 1) throw new Error("no kid, and several keys");
  // Choice: stricter than RFC 7523 §3. The URL of the token endpoint would let another server
  // that names it as its own use the assertion here.
  const audiences = [aud].flat();
  if (audiences.length !== 1 || audiences[0] !== server.configuration.issuer)
    throw new Error("another audience");
  const latest = secondsNow() + leewaySeconds;
  if (exp > latest + assertionMaxSeconds) throw new Error("exp too far ahead");
  if (iat > latest) throw new Error("iat in the future");
  await server.keys.useOnce(["assertion", client_id], jti, exp + leewaySeconds);
  return client;
}

// --- Proof of possession -------------------------------------------------------------------------

/** RFC 9449 §4.3. The thumbprint of the key that the client proves to have; none without a proof. */
async function proofThumbprint(server: Server, request: Request, client: Client) {
  const proof = request.headers.get("dpop");
  if (proof === null && !client.dpop_bound_access_tokens) return undefined;
  const { payload, protectedHeader } = await jose.jwtVerify(proof ?? "", jose.EmbeddedJWK, {
    typ: "dpop+jwt",
    algorithms: server.configuration.acceptedAlgorithms,
  });
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, iat = 0, jti } = payload;
  if (crit) throw new Error("crit in the header");
  if (privateMembers.some((member) => member in jwk)) throw new Error("private key in the header");
  if (htm !== request.method) throw new Error("htm is another method");
  if (withoutQuery(htu) !== server.tokenEndpoint) throw new Error("htu is another endpoint");
  const age = secondsNow() - iat;
  if (age > proofMaxAgeSeconds || age < -leewaySeconds) throw new Error("iat too far from now");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  await server.keys.useOnce(["dpop", jkt, server.tokenEndpoint], jti, iat + proofMaxAgeSeconds);
  return jkt;
}

/** Normalized by the URL parser (RFC 3986 §6.2.2, §6.2.3). Throws TypeError for what is no URL. */
function withoutQuery(url: unknown): string {
  const { origin, pathname } = new URL(typeof url === "string" ? url : "");
  return origin + pathname;
}

// --- Signing keys --------------------------------------------------------------------------------

/** A row of the table: a private JWK, in clear or sealed, and the dates that it was made with. */
type Row = { [column in "alg" | "kid" | "jwk"]: string } & {
  [date in (typeof bigints)[number]]: number;
};
type SigningKey = Row & { privateKey: jose.CryptoKey; publicJwk: jose.JWK };

const bigints = ["generation", "signs_from", "signs_until", "removed_at"] as const;
const pragmas =
  "PRAGMA busy_timeout = 1000; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL";
const tables = `
  CREATE TABLE IF NOT EXISTS signing_keys (
    alg TEXT, generation BIGINT, kid TEXT NOT NULL, jwk TEXT NOT NULL, signs_from BIGINT NOT NULL,
    signs_until BIGINT NOT NULL, removed_at BIGINT NOT NULL, PRIMARY KEY (alg, generation));
  CREATE TABLE IF NOT EXISTS used_jtis (id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL);
  CREATE INDEX IF NOT EXISTS used_jtis_expires_at ON used_jtis (expires_at)`;

/** The keys of all instances, and the `jti`s used at any of them, in SQLite or PostgreSQL. */
export class KeyStore {
  healthy = true;
  #settings: Configuration;
  #sql: SQL;
  #secrets: Buffer[];
  #readsClear: boolean;
  #keys: SigningKey[] = [];
  #timer: Timer | undefined;

  /** Throws for settings that are wrong. */
  constructor(settings: Configuration) {
    const { databaseUrl, keyEncryptionSecret } = settings;
    const [, path] = /^sqlite:(?:\/\/)?([^?]*)/.exec(databaseUrl) ?? [];
    const known = path || /^postgres(ql)?:/.test(databaseUrl);
    if (!known) throw new Error("DATABASE_URL must start with sqlite: or postgres:");
    const secrets = keyEncryptionSecret.split(",").filter((secret) => secret && secret !== "none");
    this.#secrets = secrets.map((secret) => Buffer.from(secret, "base64url"));
    const sound = this.#secrets.every(({ length }) => length === 32);
    if (!sound) throw new Error("KEY_ENCRYPTION_SECRET must list what `bun run secret` makes");
    if (path) {
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
      closeSync(openSync(path, "a", 0o600)); // SQLite gives -wal and -shm the mode of this file
    }
    this.#readsClear = !secrets.length || /\bnone\b/.test(keyEncryptionSecret);
    this.#settings = settings;
    this.#sql = new SQL(databaseUrl);
  }

  /** Makes tables and keys where there are none, then looks again at every poll. */
  async open(): Promise<this> {
    for (const deadline = Date.now() + 5_000; ; await Bun.sleep(50)) {
      try {
        if (this.#isSqlite) await this.#sql.unsafe(pragmas);
        const probe = this.#sql`SELECT 1 FROM signing_keys, used_jtis LIMIT 1`;
        await this.#answer(probe).catch(() => this.#answer(this.#sql.unsafe(tables)));
        break;
      } catch (error) {
        const { code, errno } = error as SQL.PostgresError;
        // What instances that start at the same instant do to one another.
        const collided = /SQLITE_BUSY|23505|42P07/.test(`${code} ${errno}`);
        if (!collided || Date.now() > deadline) throw error;
      }
    }
    await this.refresh();
    this.#timer = setInterval(() => this.#poll(), this.#settings.signingKeys.pollSeconds * 1000);
    return this;
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    await this.#sql.close({ timeout: 1 });
  }

  /** The key that signs at `at`: the one whose period holds, else the one whose period comes next. */
  signingKey(at: number): SigningKey | undefined {
    const [algorithm] = this.#settings.signingKeys.algorithms;
    return this.#keys.find(({ alg, signs_until }) => alg === algorithm && signs_until > at);
  }

  /** The keys of the JWK Set at `at`: every one until it is removed, its public members only. */
  publicJwks(at: number): jose.JWK[] {
    return this.#keys.filter(({ removed_at }) => removed_at > at).map(({ publicJwk }) => publicJwk);
  }

  /** Uses up a `jti` until `expires_at`, when its JWT is no longer accepted. Throws if it was used. */
  async useOnce(holder: string[], jti: unknown, expires_at: number): Promise<void> {
    if (typeof jti !== "string" || !jti) throw new Error("no jti");
    const id = hash("sha256", JSON.stringify([...holder, jti]), "base64url");
    const row = { id, expires_at: Math.ceil(expires_at) };
    const insert = this.#sql`INSERT INTO used_jtis ${this.#sql(row)} ON CONFLICT DO NOTHING`;
    const { count } = await this.#answer(insert).catch((error: Error) => {
      throw new Unavailable(`database: ${error.message}`);
    });
    if (count !== 1) throw new Error("jti used before");
  }

  /** Reads the table, makes each key that is missing at `at`, and sweeps what is long over. */
  async refresh(at = secondsNow()): Promise<void> {
    const { algorithms, retentionSeconds } = this.#settings.signingKeys;
    let rows = await this.#load(at);
    for (const alg of algorithms) {
      for (let from; (from = this.#missing(alg, at)) !== undefined; rows = await this.#load(at)) {
        const generations = rows.filter((row) => row.alg === alg).map((row) => row.generation);
        await this.#insert(alg, Math.max(0, ...generations) + 1, from);
      }
    }
    // Choice: later than needed, so that a clock that runs ahead or steps forgets nothing early.
    const [keysBefore, jtisBefore] = [at - retentionSeconds, at - clockStepSeconds];
    await this.#answer(this.#sql`DELETE FROM signing_keys WHERE removed_at < ${keysBefore}`);
    await this.#answer(this.#sql`DELETE FROM used_jtis WHERE expires_at < ${jtisBefore}`);
  }

  async #poll(): Promise<void> {
    try {
      await this.refresh();
      if (!this.healthy) log("database back", {});
      this.healthy = true;
    } catch (error) {
      log("database away", { reason: (error as Error).message });
      this.healthy = false;
      if (this.#isSqlite) return;
      void this.#sql.close({ timeout: 0 }); // its connections may never answer again
      this.#sql = new SQL(this.#settings.databaseUrl);
    }
  }

  get #isSqlite(): boolean {
    return this.#sql.options.adapter === "sqlite";
  }

  /** Bun.SQL has no time limit for an answer; a database that is frozen must not hold a request. */
  async #answer<T>(query: SQL.Query<T>): Promise<T> {
    const timer = setTimeout(() => query.cancel(), databaseTimeoutSeconds * 1000);
    return await query.finally(() => clearTimeout(timer));
  }

  /** Takes over all rows that can be opened. Returns all rows. */
  async #load(at: number): Promise<Row[]> {
    const select = this.#sql`SELECT * FROM signing_keys ORDER BY signs_from, generation`;
    const rows: Row[] = await this.#answer(select);
    const keys: SigningKey[] = [];
    for (const row of rows) {
      for (const column of bigints) row[column] = Number(row[column]); // PostgreSQL gives text
      const key = await this.#open(row).catch(() => this.#skip(row, rows, at));
      if (key) keys.push(key);
    }
    this.#keys = keys;
    return rows;
  }

  async #open(row: Row): Promise<SigningKey> {
    const known = this.#keys.find(({ jwk }) => jwk === row.jwk);
    if (known) return { ...known, ...row };
    const jwk = JSON.parse(await this.#unseal(row.jwk));
    const members = publicMembers.filter((member) => member in jwk).map((m) => [m, jwk[m]]);
    const publicJwk = { ...Object.fromEntries(members), kid: row.kid, alg: row.alg, use: "sig" };
    return {
      ...row,
      publicJwk,
      privateKey: (await jose.importJWK(jwk, row.alg)) as jose.CryptoKey,
    };
  }

  /** Without the key that is due there is no start; later one that cannot be opened is passed over. */
  #skip(row: Row, rows: Row[], at: number): void {
    const due = rows.find(({ alg, signs_until }) => alg === row.alg && signs_until > at);
    const reason = `KEY_ENCRYPTION_SECRET does not open the ${row.alg} key ${row.kid}`;
    if (!this.#timer && row === due) throw new Error(reason);
    log("key skipped", { reason });
  }

  /** From when a key is missing: one must sign, and one must be public to follow it. */
  #missing(alg: string, at: number): number | undefined {
    const [signing, ...later] = this.#keys.filter((key) => key.alg === alg && key.signs_until > at);
    if (!signing) return at;
    const followed = later.some(({ signs_from }) => signs_from >= signing.signs_until);
    return followed ? undefined : signing.signs_until;
  }

  /** Another instance may be faster with its own: then this one is not needed. */
  async #insert(alg: string, generation: number, signs_from: number): Promise<void> {
    const { rotationSeconds, retentionSeconds } = this.#settings.signingKeys;
    const { privateKey } = await jose.generateKeyPair(alg, { extractable: true });
    const jwk = await jose.exportJWK(privateKey);
    const kid = await jose.calculateJwkThumbprint(jwk);
    const signs_until = signs_from + rotationSeconds;
    const removed_at = signs_until + retentionSeconds;
    const sealed = await this.#seal(JSON.stringify(jwk));
    const row: Row = { alg, generation, kid, jwk: sealed, signs_from, signs_until, removed_at };
    await this.#answer(
      this.#sql`INSERT INTO signing_keys ${this.#sql(row)} ON CONFLICT DO NOTHING`,
    );
    if (this.#isSqlite) await this.#sql.unsafe("PRAGMA wal_checkpoint(TRUNCATE)");
  }

  async #seal(text: string): Promise<string> {
    const [secret] = this.#secrets;
    if (!secret) return text;
    const jwe = new jose.CompactEncrypt(Buffer.from(text));
    return await jwe.setProtectedHeader({ alg: "dir", enc: "A256GCM" }).encrypt(secret);
  }

  async #unseal(text: string): Promise<string> {
    if (text.startsWith("{") && this.#readsClear) return text;
    const opening = this.#secrets.map((secret) => jose.compactDecrypt(text, secret));
    return utf8.decode((await Promise.any(opening)).plaintext);
  }
}

// --- Routes --------------------------------------------------------------------------------------

/** What GET answers, by path. */
const documents = new Map<string, (server: Server) => Response>([
  ["/.well-known/openid-configuration", metadata],
  ["/.well-known/oauth-authorization-server", metadata],
  ["/.well-known/openid-configuration/jwks", jwks],
  ["/health", health],
]);

function route(server: Server, request: Request, address: string): Response | Promise<Response> {
  // Not always an absolute URL (HTTP/1.0, CONNECT): `new URL` could throw.
  const path = /^(?:https?:\/\/[^/?#]*)?([^?#]*)/.exec(request.url)?.[1] ?? "";
  const { method } = request;
  if (path === "/connect/token") {
    return method === "POST" ? token(server, request, address) : plain(405, { allow: "POST" });
  }
  const document = documents.get(path);
  if (!document) return plain(404);
  return /^(GET|HEAD)$/.test(method) ? document(server) : plain(405, { allow: "GET, HEAD" });
}

function plain(status: number, headers?: Record<string, string>): Response {
  return new Response(STATUS_CODES[status], { status, headers: { ...noStore, ...headers } });
}

/** RFC 8414 §2, made from the configuration: what is advertised is what is done. */
function metadata({ configuration, cacheable }: Server): Response {
  const { issuer, clients, scopes, acceptedAlgorithms } = configuration;
  return Response.json(
    {
      issuer,
      jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
      token_endpoint: `${issuer}/connect/token`,
      scopes_supported: scopes.map(({ scope }) => scope),
      response_types_supported: [],
      grant_types_supported: ["client_credentials"],
      token_endpoint_auth_methods_supported: [
        "client_secret_basic",
        "client_secret_post",
        "private_key_jwt",
      ],
      token_endpoint_auth_signing_alg_values_supported: acceptedAlgorithms,
      dpop_signing_alg_values_supported: acceptedAlgorithms,
      protected_resources: [...new Set(scopes.map(({ resource }) => resource))], // RFC 9728 §4
    },
    { headers: cacheable },
  );
}

function jwks({ keys, cacheable }: Server): Response {
  return Response.json({ keys: keys.publicJwks(secondsNow()) }, { headers: cacheable });
}

/** Whether this instance should get requests. */
function health({ keys }: Server): Response {
  const ready = !lifecycle.stopping && keys.signingKey(secondsNow());
  const status = ready ? (keys.healthy ? "ok" : "degraded") : "unavailable";
  return Response.json({ status }, { status: ready ? 200 : 503, headers: noStore });
}

// --- Start ---------------------------------------------------------------------------------------

/** The configuration made ready for requests. Throws for a mistake in it, naming the field. */
async function prepare(configuration: Configuration) {
  const { issuer, scopes, clients, signingKeys } = configuration;
  check(configuration);
  const resourceOf = new Map(scopes.map(({ scope, resource }) => [scope, resource]));
  return {
    configuration,
    resourceOf,
    tokenEndpoint: `${issuer}/connect/token`,
    clients: new Map(clients.map((client) => [client.client_id, register(client, resourceOf)])),
    keys: await new KeyStore(configuration).open(),
    strongSecretsOnly: !isLoopback(new URL(issuer)),
    challenge: { "www-authenticate": `Basic realm="${issuer}", charset="UTF-8"` },
    cacheable: { "cache-control": `public, max-age=${signingKeys.maxAgeSeconds}` },
  };
}

function register(client: ClientRegistration, resourceOf: Map<string, string>) {
  const scopesAt = new Map<string, Set<string>>();
  for (const scope of client.scope.split(" ")) {
    const resource = resourceOf.get(scope)!;
    scopesAt.set(resource, (scopesAt.get(resource) ?? new Set()).add(scope));
  }
  const secrets = (client.client_secrets ?? []).map(({ sha256, expires_at = Infinity }) => ({
    sha256: Buffer.from(sha256, "base64"),
    expires_at,
  }));
  const jwkSet = client.jwks && jose.createLocalJWKSet(client.jwks);
  return { ...client, scopesAt, secrets: secrets.length ? secrets : unmatchedSecrets, jwkSet };
}

/** Throws for the first rule that does not hold. */
function check({ scopes, clients, signingKeys, acceptedAlgorithms }: Configuration): void {
  const { algorithms, rotationSeconds, retentionSeconds, pollSeconds, ...delays } = signingKeys;
  const caches =
    2 * (pollSeconds + delays.maxAgeSeconds + delays.refreshSeconds + delays.coolDownSeconds);
  const longest = Math.max(...clients.map((client) => client.access_token_lifetime_seconds));
  const known = scopes.map(({ scope }) => scope);
  const rules: [unknown, string][] = [
    [
      rotationSeconds > caches,
      `signingKeys.rotationSeconds must be over ${caches}, for the caches`,
    ],
    [
      retentionSeconds >= longest,
      `signingKeys.retentionSeconds must be ${longest}, a token's life`,
    ],
    [
      algorithms[0] && isSubset(algorithms, acceptedAlgorithms),
      "signingKeys.algorithms has an unknown one",
    ],
    [
      new Set(clients.map(({ client_id }) => client_id)).size === clients.length,
      "clients has a client_id twice",
    ],
    ...clients.flatMap(
      ({ client_id, scope, claims = {}, client_secrets = [], jwks }): [unknown, string][] => [
        [
          isSubset(scope.split(" "), known),
          `clients: scope of ${client_id} is not among the scopes`,
        ],
        [
          !reservedClaims.some((name) => name in claims),
          `clients: claims of ${client_id} has a reserved one`,
        ],
        [
          client_secrets.every(({ sha256 }) => /^[\w+/]{43}=$/.test(sha256)),
          `clients: sha256 of ${client_id} is not a SHA-256 in base64`,
        ],
        [
          !jwks?.keys.some((jwk) => privateMembers.some((name) => name in jwk)),
          `clients: jwks of ${client_id} has a private key`,
        ],
      ],
    ),
  ];
  for (const [holds, rule] of rules) if (!holds) throw new Error(`config.ts: ${rule}`);
}

function isSubset(part: string[], whole: string[]): boolean {
  return part.every((member) => whole.includes(member));
}

/** Starts the server. Throws for mistakes in the configuration and for a database out of reach. */
export async function start(configuration = authorizationServer) {
  const origin = requireOrigin("ISSUER", configuration.issuer);
  const listening = await listenOptions("ISSUER", origin, configuration.listen);
  const server = await prepare(configuration);
  const http = Bun.serve({
    ...listening,
    development: false,
    maxRequestBodySize: 16_384,
    fetch: (request, http) => {
      const answer = route(server, request, http.requestIP(request)?.address ?? "");
      return lifecycle.stopping ? closing(answer) : answer;
    },
    error: (error) => {
      const unavailable = error instanceof Unavailable;
      log("request failed", {
        reason: unavailable ? error.message : `${error.stack}`.slice(0, 2_000),
      });
      return unavailable ? plain(503, { "retry-after": "5" }) : plain(500);
    },
  });
  return { http, keys: server.keys };
}

async function closing(answer: Response | Promise<Response>): Promise<Response> {
  const response = await answer;
  response.headers.set("connection", "close");
  return response;
}

async function main(): Promise<void> {
  if (process.argv[2] === "--new-secret") {
    const secret = Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url");
    console.log(`secret: ${secret}\nsha256: ${hash("sha256", secret, "base64")}`);
    return;
  }
  const { http, keys } = await start();
  stopOnSignal(http, () => keys.close());
  console.error(`authorization server: ${authorizationServer.issuer}`);
}

if (import.meta.main) main().catch(fail);
