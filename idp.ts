/**
 * The authorization server (RFC 6749 §1.1): gives a registered client an access token.
 *
 *   POST /connect/token                           client credentials grant, RFC 6749 §4.4
 *   GET  /.well-known/openid-configuration        metadata, RFC 8414
 *   GET  /.well-known/oauth-authorization-server  the same
 *   GET  /.well-known/openid-configuration/jwks   public keys, RFC 7517
 *   GET  /health
 *
 * Clients authenticate with a secret or a key (RFC 7523); tokens are JWTs (RFC 9068), bound to a
 * key of the client if it sends a proof (RFC 9449). No users, sessions, refresh, introspection.
 * Run: bun run idp.ts   (--new-secret: make a secret for a client)
 */

import { hash, randomBytes, timingSafeEqual } from "node:crypto";
import { closeSync, mkdirSync, openSync } from "node:fs";
import { dirname } from "node:path";
import * as jose from "jose";
import { authorizationServer, type ClientRegistration, fail, isLoopback } from "./config.ts";
import { lifecycle, listenOptions, log, requireOrigin, stopOnSignal } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

type Form = Map<string, string>;
type KeySet = ReturnType<typeof jose.createLocalJWKSet> | undefined;
/** `scopesAt`: the scopes that it may have, by resource. */
type Client = ClientRegistration & { scopesAt: Map<string, string[]>; jwkSet: KeySet };
type Entry = Record<string, unknown>;

const { issuer, scopes, signingKeys, acceptedAlgorithms, databaseUrl } = authorizationServer;
const { algorithms, rotationSeconds, retentionSeconds, ...delays } = signingKeys;
const tokenEndpoint = `${issuer}/connect/token`;
const authenticationMethods = ["client_secret_basic", "client_secret_post", "private_key_jwt"];
const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
const leewaySeconds = 30;
const proofRules = { typ: "dpop+jwt", algorithms: acceptedAlgorithms };
const assertionMaxSeconds = 600;
const proofMaxAgeSeconds = 90;
const parameters = `grant_type scope resource client_id client_secret
  client_assertion client_assertion_type`.split(/\s+/);
/** For unknown clients: as long as a SHA-256 in base64, and equal to none. */
const dummySecrets: { sha256: string; expires_at?: number }[] = [{ sha256: "".padEnd(44) }];
const isHash = /^[A-Za-z0-9+/]{43}=$/;
const reservedClaims = "iss sub aud exp nbf iat jti client_id scope cnf".split(" ");
const privateMembers = "d p q dp dq qi oth k priv".split(" ");
const publicMembers = "kty crv x y n e pub".split(" ");
const noStore = new Headers({ "cache-control": "no-store", pragma: "no-cache" }); // RFC 6749 §5.1
const cacheable = new Headers({ "cache-control": `public, max-age=${delays.maxAgeSeconds}` });
lifecycle.answers.push(noStore, cacheable);
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const secondsNow = () => Math.floor(Date.now() / 1000);

/** The resource of each scope, and the registered clients, made ready when the server starts. */
const resources = new Map(scopes.map(({ scope, resource }) => [scope, resource]));
const clients = new Map<string, Client>();

// --- Errors --------------------------------------------------------------------------------------

/**
 * RFC 6749 §5.2, RFC 8707 §2, RFC 9449 §5, and two for failures of our own: each code with its
 * status and a constant text. The reason goes to the log.
 */
const errors = {
  invalid_request: [400, "The request is malformed, repeats a parameter or authenticates twice."],
  invalid_client: [401, "Client authentication failed. The log of the server has the reason."],
  unauthorized_client: [400, "The client is not registered for this grant type."],
  unsupported_grant_type: [400, "The only grant type here is client_credentials."],
  invalid_scope: [400, "The scope is unknown, not granted, or belongs to several resources."],
  invalid_target: [400, "The resource is unknown, repeated, or one without a granted scope."],
  invalid_dpop_proof: [400, "The DPoP proof is missing or not valid."],
  temporarily_unavailable: [503, "The server cannot answer this now. Try again soon."],
  server_error: [500, "Internal Server Error"],
} as const;

class Refusal extends Error {
  readonly code: keyof typeof errors;

  constructor(code: keyof typeof errors, reason: string) {
    super(reason);
    this.code = code;
  }
}

function unavailable(reason: string): never {
  healthy = false;
  throw new Refusal("temporarily_unavailable", reason);
}

// --- Token endpoint ------------------------------------------------------------------------------

/** Answers a token request (RFC 6749 §4.4). */
async function token(request: Request, http: Bun.Server<undefined>): Promise<Response> {
  const started = performance.now();
  const entry: Entry = { address: http.requestIP(request)?.address };
  let fallback: keyof typeof errors = "invalid_request"; // the code of an Error that is no Refusal
  try {
    const form = parseForm(request.headers.get("content-type"), await request.text());
    fallback = "invalid_client";
    const client = await authenticate(request.headers.get("authorization"), form, entry);
    checkGrantType(client, form.get("grant_type"));
    fallback = "invalid_dpop_proof";
    const proof = request.headers.get("dpop");
    const isBound = proof !== null || client.dpop_bound_access_tokens;
    const jkt = isBound ? await proofThumbprint(proof ?? "") : undefined;
    fallback = "server_error";
    const { aud, scope } = grantScope(client, form);
    return Response.json(await issue(client, aud, scope, entry, jkt), { headers: noStore });
  } catch (error) {
    const code = error instanceof Refusal ? error.code : fallback;
    Object.assign(entry, { error: code, reason: (error as Error).message.slice(0, 2_000) });
    const [status, error_description] = errors[code];
    const headers = new Headers(noStore);
    if (status === 401) headers.set("www-authenticate", `Basic realm="${issuer}", charset="UTF-8"`);
    if (status === 503) headers.set("retry-after", "5");
    return Response.json({ error: code, error_description }, { status, headers });
  } finally {
    entry["milliseconds"] = Math.round(performance.now() - started);
    log(entry["error"] ? "token refused" : "token issued", entry);
  }
}

/** The parameters that this server reads; an empty one counts as absent (RFC 6749 §3.2). */
function parseForm(contentType: string | null, body: string): Form {
  const mediaType = contentType?.split(";")[0]?.trim().toLowerCase();
  if (mediaType !== "application/x-www-form-urlencoded") throw new Error("not a form");
  if (body.includes("\uFFFD")) throw new Error("not UTF-8"); // what text() puts for such bytes
  const form: Form = new Map();
  for (const pair of body.split("&")) {
    const [name, value] = decodePair(pair, "=");
    if (!parameters.includes(name)) continue;
    const other = form.get(name);
    if (other !== undefined && name !== "resource") throw new Error(`${name} is repeated`);
    // Several resources become one with a space in it: unknown, hence invalid_target (RFC 8707 §2).
    form.set(name, other === undefined ? value : `${other} ${value}`);
  }
  // Only now, for also an empty one must not be repeated.
  for (const [name, value] of form) if (!value) form.delete(name);
  return form;
}

/** Both halves, form-decoded (RFC 6749 Appendix B). Throws for what is malformed, and for NUL. */
function decodePair(text: string, separator: string): [string, string] {
  const [first = "", ...rest] = text.split(separator);
  return [formDecode(first), formDecode(rest.join(separator))];
}

function formDecode(text: string): string {
  const decoded = /[%+]/.test(text) ? decodeURIComponent(text.replaceAll("+", " ")) : text;
  if (decoded.includes("\0")) throw new Error("NUL in a parameter");
  return decoded;
}

function checkGrantType({ grant_types }: Client, type: string | undefined): void {
  if (!type) throw new Refusal("invalid_request", "no grant_type");
  if (type !== "client_credentials") throw new Refusal("unsupported_grant_type", "another one");
  if (!grant_types.includes(type)) throw new Refusal("unauthorized_client", "not registered");
}

/** One resource and scopes of it (RFC 6749 §3.3, RFC 8707 §2.2): all that was asked, or none. */
function grantScope({ scopesAt }: Client, form: Form) {
  const named = form.get("resource");
  if (named && !scopesAt.has(named)) throw new Refusal("invalid_target", "no scope there");
  const requested = form.get("scope")?.split(" ");
  // Choice (§3.3): without a scope, all that the client has at the resource; it must be only one.
  const only = scopesAt.size === 1 ? [...scopesAt.keys()][0] : undefined;
  // The first scope names the resource; all others must belong to it.
  const aud = named ?? (requested ? resources.get(requested[0]!) : only) ?? "";
  const granted = scopesAt.get(aud) ?? [];
  const names = [...new Set(requested ?? granted)];
  const all = names.length > 0 && names.every((name) => granted.includes(name));
  if (!all) throw new Refusal("invalid_scope", "unknown, not granted or of several resources");
  return { aud, scope: names.join(" ") };
}

/** The answer (RFC 6749 §5.1) with a signed access token (RFC 9068 §2). */
async function issue(client: Client, aud: string, scope: string, entry: Entry, jkt?: string) {
  const { client_id, access_token_lifetime_seconds } = client;
  const iat = secondsNow();
  const { alg, kid, privateKey, removed_at } = signingKey(iat) ?? unavailable("no signing key");
  // Once the key is gone, nobody can verify the token.
  const exp = Math.min(iat + access_token_lifetime_seconds, removed_at);
  const jti = crypto.randomUUID();
  const claims = { iss: issuer, sub: client_id, aud, client_id, scope, iat, nbf: iat, exp, jti };
  const allClaims = { ...claims, ...(jkt && { cnf: { jkt } }), ...client.claims };
  const jws = new jose.CompactSign(Buffer.from(JSON.stringify(allClaims)));
  jws.setProtectedHeader({ alg, kid, typ: "at+jwt" });
  const access_token = await jws.sign(privateKey);
  Object.assign(entry, { scope, kid, jti });
  return { access_token, token_type: jkt ? "DPoP" : "Bearer", expires_in: exp - iat, scope };
}

// --- Client authentication -----------------------------------------------------------------------

/** By exactly one method (RFC 6749 §2.3). Returns the client, or throws why it is not accepted. */
function authenticate(authorization: string | null, form: Form, entry: Entry) {
  const assertion = form.get("client_assertion") ?? form.get("client_assertion_type");
  // Two Authorization fields arrive as one, joined by a comma.
  const fields = authorization?.replace(/"[^"]*"/g, "").split(/, *(?=[^\s=,"]+(?: |$))/) ?? [];
  // Half of an assertion counts too.
  const ways = [...fields, form.get("client_secret"), assertion].filter((way) => way !== undefined);
  if (ways.length > 1) throw new Refusal("invalid_request", "authenticates in more than one way");
  const named = form.get("client_id");
  const inForm = [assertion ? subjectOf(form) : named, form.get("client_secret")];
  const [client_id = "", secret = ""] = authorization ? basicCredentials(authorization) : inForm;
  const client = clients.get(client_id);
  entry["client_id"] = client?.client_id; // another one may be a secret in the wrong place
  if ((named ?? client_id) !== client_id) throw new Refusal("invalid_request", "two client ids");
  return assertion ? verifyAssertion(client, assertion) : verifySecret(client, secret);
}

/** RFC 6749 §2.3.1: id and secret are form-encoded within the credentials of RFC 7617 §2. */
function basicCredentials(authorization: string): [string, string] {
  const [, encoded] = /^Basic +(\S+)$/i.exec(authorization) ?? [];
  if (!encoded) throw new Error("no Basic credentials in Authorization");
  const credentials = utf8.decode(Uint8Array.fromBase64(encoded));
  if (!credentials.includes(":")) throw new Error("no colon in Basic");
  return decodePair(credentials, ":");
}

/** RFC 7523 §2.2. Whom an assertion names, before it is verified. */
function subjectOf(form: Form): string {
  if (form.get("client_assertion_type") !== jwtBearer) throw new Error("unknown assertion type");
  return `${jose.decodeJwt(form.get("client_assertion") ?? "").sub}`;
}

/** Compares by SHA-256, in constant time, and does so for unknown clients too. */
function verifySecret(client: Client | undefined, secret: string): Client {
  if (!secret) throw new Error("no credentials");
  // RFC 6749 §2.3.1: "MUST protect any endpoint utilizing it against brute force attacks".
  // Choice: no throttle, for any locks somebody out; a public issuer takes no weak secret instead.
  if (secret.length < 32 && !isLoopback(new URL(issuer))) throw new Error("secret too short");
  const presented = Buffer.from(hash("sha256", secret, "base64"));
  let reason = client ? "wrong secret" : "unknown client";
  const registered = client?.client_secrets?.length ? client.client_secrets : dummySecrets;
  for (const { sha256, expires_at = Infinity } of registered) {
    if (!timingSafeEqual(Buffer.from(sha256), presented)) continue;
    if (client && expires_at > secondsNow()) return client;
    reason = "expired secret";
  }
  throw new Error(reason);
}

/** private_key_jwt: RFC 7523 §3, and its audience as rfc7523bis has it. */
async function verifyAssertion(client: Client | undefined, assertion: string): Promise<Client> {
  if (!client?.jwkSet) throw new Error("client unknown or without keys");
  const { client_id, jwkSet, jwks } = client;
  const { payload, protectedHeader } = await jose.jwtVerify(assertion, jwkSet, {
    algorithms: acceptedAlgorithms,
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
  const [audience, ...others] = [aud].flat();
  if (audience !== issuer || others.length) throw new Error("another audience than the issuer");
  const latest = secondsNow() + leewaySeconds;
  if (exp > latest + assertionMaxSeconds) throw new Error("exp too far ahead");
  if (iat > latest) throw new Error("iat in the future");
  await useOnce(["assertion", client_id], jti, exp + leewaySeconds);
  return client;
}

// --- Proof of possession -------------------------------------------------------------------------

/**
 * RFC 9449 §4.3. The thumbprint of the key that a proof shows the client to have. The API checks
 * proofs with code of its own: the two share nothing but HTTP.
 */
async function proofThumbprint(proof: string): Promise<string> {
  const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK, proofRules);
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, iat = 0, jti } = payload;
  if (crit) throw new Error("crit in the header");
  // jose lets an RSA key with p and q pass.
  if (privateMembers.some((member) => member in jwk)) throw new Error("private key in the header");
  const [target] = new URL(typeof htu === "string" ? htu : "").href.split(/[?#]/); // normalized
  if (htm !== "POST" || target !== tokenEndpoint) throw new Error("for another request");
  const age = secondsNow() - iat;
  if (age > proofMaxAgeSeconds || age < -leewaySeconds) throw new Error("iat too far from now");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  await useOnce(["dpop", jkt, tokenEndpoint], jti, iat + proofMaxAgeSeconds);
  return jkt;
}

// --- Signing keys --------------------------------------------------------------------------------

/** A row of the table: a private JWK, in clear or sealed, and the dates that it was made with. */
type Row = Record<"alg" | "kid" | "jwk", string> & Record<(typeof bigintColumns)[number], number>;
type SigningKey = Row & { privateKey: jose.CryptoKey; publicJwk: jose.JWK };

const bigintColumns = ["generation", "signs_from", "signs_until", "removed_at"] as const;
const pragma = "PRAGMA busy_timeout = 100; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL";
const tables = `
  CREATE TABLE IF NOT EXISTS signing_keys (
    alg TEXT, generation BIGINT, kid TEXT NOT NULL, jwk TEXT NOT NULL, signs_from BIGINT NOT NULL,
    signs_until BIGINT NOT NULL, removed_at BIGINT NOT NULL, PRIMARY KEY (alg, generation));
  CREATE TABLE IF NOT EXISTS used_jtis (id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL);
  CREATE INDEX IF NOT EXISTS used_jtis_expires_at ON used_jtis (expires_at)`;
const [, sqliteFile] = /^sqlite:(?:\/\/)?([^?]+)/.exec(databaseUrl) ?? [];
const secrets = authorizationServer.keyEncryptionSecret.split(",").filter(Boolean);
const seals = secrets.filter((word) => word !== "none").map((s) => Buffer.from(s, "base64url"));

let sql: Bun.SQL;
let keys: SigningKey[] = [];
let healthy = true;
let polling: Timer | undefined; // once the server has started

/** The key that signs at `at`: the one whose period holds, else the one whose period comes next. */
export function signingKey(at: number): SigningKey | undefined {
  return keys.find(({ alg, signs_until }) => alg === algorithms[0] && signs_until > at);
}

/** The JWK Set (RFC 7517 §5) at `at`: of every key until it is removed, the public members. */
export function publicKeys(at: number): jose.JWK[] {
  return keys.filter(({ removed_at }) => removed_at > at).map(({ publicJwk }) => publicJwk);
}

/** Uses up a `jti` until its JWT is accepted no longer. Throws if it was used before. */
async function useOnce(holder: string[], jti: unknown, expires_at: number): Promise<void> {
  if (typeof jti !== "string" || !jti) throw new Error("no jti");
  const id = hash("sha256", JSON.stringify([...holder, jti]), "base64url");
  const row = sql({ id, expires_at: Math.ceil(expires_at) });
  const insert = inTime(sql`INSERT INTO used_jtis ${row} ON CONFLICT DO NOTHING`);
  const { count } = await insert.catch(({ message }) => unavailable(message));
  if (count !== 1) throw new Error("jti used before");
}

/** Opens the database, and makes what is missing in it. Throws for one that cannot be used. */
async function openDatabase(): Promise<void> {
  for (const deadline = Date.now() + 5_000; ; await Bun.sleep(50)) {
    try {
      if (sqliteFile) {
        mkdirSync(dirname(sqliteFile), { recursive: true, mode: 0o700 });
        closeSync(openSync(sqliteFile, "a", 0o600)); // SQLite gives -wal and -shm the same mode
      }
      sql ??= new Bun.SQL(databaseUrl);
      if (sqliteFile) await sql.unsafe(pragma);
      const probe = inTime(sql`SELECT 1 FROM signing_keys, used_jtis LIMIT 1`);
      await probe.catch(() => inTime(sql.unsafe(tables)));
      await refresh();
      break;
    } catch (error) {
      const { code, errno, message } = error as Bun.SQL.PostgresError;
      // What instances that start at the same instant do to one another.
      const isOver = !/BUSY|23505|42P07|42710/.test(`${code} ${errno}`) || Date.now() > deadline;
      if (isOver) throw new Error(`Cannot use the database: ${message}`);
    }
  }
  polling = setInterval(poll, delays.pollSeconds * 1000);
}

/** Bun.SQL has no time limit for an answer; a database that is frozen must not hold a request. */
async function inTime<T>(query: Bun.SQL.Query<T>): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timeout = setTimeout(() => reject(new Error("no answer of the database in 2 s")), 2_000);
  return await Promise.race([query, late]).finally(() => clearTimeout(timeout));
}

async function poll(): Promise<void> {
  try {
    await refresh();
    if (!healthy) log("database back", {});
    healthy = true;
  } catch (error) {
    log("database away", { reason: (error as Error).message });
    healthy = false;
    if (sqliteFile) return;
    sql.close({ timeout: 0 }).catch(() => {}); // its connections may never answer again
    sql = new Bun.SQL(databaseUrl);
  }
}

/** Reads the table, makes each key that is missing at `at`, and sweeps what is long over. */
export async function refresh(at = secondsNow()): Promise<void> {
  let rows = await load();
  const due = (alg: string) => rows.find((row) => row.alg === alg && row.signs_until > at)?.kid;
  const locked = algorithms.map(due).find((kid) => kid && !keys.some((key) => key.kid === kid));
  // At the start it ends the program; later such a key is reported and passed over.
  if (locked && !polling)
    throw new Error(`KEY_ENCRYPTION_SECRET lacks the secret of key ${locked}`);
  for (const alg of algorithms) {
    while (missing(alg, at) !== undefined) {
      const generations = rows.filter((row) => row.alg === alg).map((row) => row.generation);
      await insertKey(alg, Math.max(0, ...generations) + 1, missing(alg, at)!);
      rows = await load();
    }
  }
  // Choice: later than needed, so that a clock that runs ahead or steps forgets nothing early.
  await inTime(sql`DELETE FROM signing_keys WHERE removed_at < ${at - retentionSeconds}`);
  await inTime(sql`DELETE FROM used_jtis WHERE expires_at < ${at - 300}`);
}

/** Takes over the rows that can be opened. Returns all rows. */
async function load(): Promise<Row[]> {
  const rows: Row[] = await inTime(sql`SELECT * FROM signing_keys ORDER BY signs_from, generation`);
  // PostgreSQL gives text.
  for (const row of rows) for (const column of bigintColumns) row[column] = Number(row[column]);
  const open = (row: Row) => openKey(row).catch(() => void log("key skipped", { kid: row.kid }));
  keys = (await Promise.all(rows.map(open))).filter((key) => key !== undefined);
  return rows;
}

async function openKey(row: Row): Promise<SigningKey> {
  const known = keys.find(({ jwk }) => jwk === row.jwk);
  if (known) return { ...known, ...row };
  const jwk = JSON.parse(await unseal(row.jwk));
  const members = JSON.parse(JSON.stringify(jwk, publicMembers)); // an allow-list
  const publicJwk = { ...members, kid: row.kid, alg: row.alg, use: "sig" };
  return { ...row, publicJwk, privateKey: (await jose.importJWK(jwk, row.alg)) as jose.CryptoKey };
}

/** From when a key is missing: one must sign, and one must be public to follow it. */
function missing(alg: string, at: number): number | undefined {
  const [signing, ...later] = keys.filter((key) => key.alg === alg && key.signs_until > at);
  if (!signing) return at;
  const followed = later.some(({ signs_from }) => signs_from >= signing.signs_until);
  return followed ? undefined : signing.signs_until;
}

/** Offers a key. If another instance was faster with its own, this one is not needed. */
async function insertKey(alg: string, generation: number, signs_from: number): Promise<void> {
  const { privateKey } = await jose.generateKeyPair(alg, { extractable: true });
  const jwk = await jose.exportJWK(privateKey);
  const kid = await jose.calculateJwkThumbprint(jwk);
  const signs_until = signs_from + rotationSeconds;
  const dates = { signs_from, signs_until, removed_at: signs_until + retentionSeconds };
  const row: Row = { alg, generation, kid, jwk: await seal(JSON.stringify(jwk)), ...dates };
  await inTime(sql`INSERT INTO signing_keys ${sql(row)} ON CONFLICT DO NOTHING`);
  if (sqliteFile) await sql.unsafe("PRAGMA wal_checkpoint(TRUNCATE)");
}

async function seal(text: string): Promise<string> {
  if (!seals[0]) return text;
  const jwe = new jose.CompactEncrypt(Buffer.from(text));
  return await jwe.setProtectedHeader({ alg: "dir", enc: "A256GCM" }).encrypt(seals[0]);
}

async function unseal(text: string): Promise<string> {
  if (text.startsWith("{") && (!seals.length || secrets.includes("none"))) return text;
  const opening = seals.map((secret) => jose.compactDecrypt(text, secret));
  return utf8.decode((await Promise.any(opening)).plaintext);
}

// --- Routes --------------------------------------------------------------------------------------

/** What GET answers, by path. */
const documents = new Map([
  ["/.well-known/openid-configuration", metadata],
  ["/.well-known/oauth-authorization-server", metadata],
  ["/.well-known/openid-configuration/jwks", jwks],
  ["/health", health],
]);

function route(request: Request, http: Bun.Server<undefined>): Response | Promise<Response> {
  // Cut out by hand, for it is not always part of an absolute URL (HTTP/1.0, CONNECT).
  const path = /^(?:https?:\/\/[^/?#]*)?([^?#]*)/.exec(request.url)![1]!;
  const document = documents.get(path);
  if (document) return /^(GET|HEAD)$/.test(request.method) ? document() : notAllowed("GET, HEAD");
  const isToken = path === "/connect/token";
  if (!isToken) return new Response("Not Found", { status: 404, headers: noStore });
  return request.method === "POST" ? token(request, http) : notAllowed("POST");
}

function notAllowed(allow: string): Response {
  const headers = { ...Object.fromEntries(noStore), allow };
  return new Response("Method Not Allowed", { status: 405, headers });
}

/** RFC 8414 §2, made from the configuration: what is advertised is what is done. */
function metadata(): Response {
  const document = {
    issuer,
    jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
    token_endpoint: tokenEndpoint,
    scopes_supported: [...resources.keys()],
    response_types_supported: [], // Choice: §2 requires it, though §3.2 would omit an empty one
    grant_types_supported: ["client_credentials"],
    token_endpoint_auth_methods_supported: authenticationMethods,
    token_endpoint_auth_signing_alg_values_supported: acceptedAlgorithms,
    dpop_signing_alg_values_supported: acceptedAlgorithms,
    protected_resources: [...new Set(resources.values())], // RFC 9728 §4
  };
  return Response.json(document, { headers: cacheable });
}

function jwks(): Response {
  return Response.json({ keys: publicKeys(secondsNow()) }, { headers: cacheable });
}

/** Whether this instance should get requests. */
function health(): Response {
  const ready = !lifecycle.stopping && signingKey(secondsNow());
  const status = ready ? (healthy ? "ok" : "degraded") : "unavailable";
  return Response.json({ status }, { status: ready ? 200 : 503, headers: noStore });
}

// --- Start ---------------------------------------------------------------------------------------

/** Throws for the first mistake, and names the field. */
function checkConfiguration(): void {
  check(/^(sqlite|postgres(ql)?):./.test(databaseUrl), "DATABASE_URL must be sqlite: or postgres:");
  check(!seals.some((s) => s.length !== 32), "KEY_ENCRYPTION_SECRET needs 32 bytes, base64url");
  const caches = 2 * Object.values(delays).reduce((sum, seconds) => sum + seconds);
  const shortest = Math.min(rotationSeconds - caches, retentionSeconds, ...Object.values(delays));
  check(shortest > 0, `signingKeys.rotationSeconds must be over ${caches}, each time over 0`);
  const known = algorithms.length && algorithms.every((alg) => acceptedAlgorithms.includes(alg));
  check(known, "signingKeys.algorithms must be some of acceptedAlgorithms");
  for (const { scope, resource } of scopes) {
    const isUri = URL.canParse(resource) && !resource.includes("#"); // RFC 8707 §2
    check(isUri && resources.get(scope) === resource, `scopes: ${scope}: needs one resource URI`);
  }
  authorizationServer.clients.forEach(register);
}

function register(client: ClientRegistration): void {
  const { client_id, scope, claims = {}, client_secrets = [], jwks } = client;
  const field = `clients: ${client_id}:`;
  check(client_id && !clients.has(client_id), `${field} client_id is empty or there twice`);
  const names = scope.split(" ");
  check(!names.some((name) => !resources.has(name)), `${field} scope is not in scopes`);
  check(!reservedClaims.some((name) => name in claims), `${field} claims has a reserved name`);
  check(client_secrets.length || jwks?.keys.length, `${field} needs client_secrets or jwks`);
  const stored = client_secrets.every((s) => isHash.test(s.sha256) && (s.expires_at ?? 0) < 1e11);
  check(stored, `${field} client_secrets need a SHA-256 in base64, and expires_at in seconds`);
  const isPrivate = jwks?.keys.some((jwk) => privateMembers.some((name) => name in jwk));
  check(!isPrivate, `${field} jwks has a private key`);
  const { access_token_lifetime_seconds: lifetime } = client;
  const kept = Number.isInteger(lifetime) && lifetime > 0 && lifetime <= retentionSeconds;
  check(kept, `${field} access_token_lifetime_seconds is not 1 to signingKeys.retentionSeconds`);
  const scopesAt = Map.groupBy(names, (name) => resources.get(name)!);
  clients.set(client_id, { ...client, scopesAt, jwkSet: jwks && jose.createLocalJWKSet(jwks) });
}

function check(holds: unknown, rule: string): void {
  if (!holds) throw new Error(`config.ts: ${rule}`);
}

/** Starts the server. Throws for mistakes in the configuration and a database out of reach. */
export async function start() {
  const listening = await listenOptions("ISSUER", requireOrigin("ISSUER", issuer));
  checkConfiguration();
  await openDatabase();
  return Bun.serve({ ...listening, development: false, maxRequestBodySize: 16_384, fetch: route });
}

if (import.meta.main) {
  if (process.argv.includes("--new-secret")) {
    const secret = randomBytes(32).toString("base64url");
    console.log(`secret: ${secret}\nsha256: ${hash("sha256", secret, "base64")}`);
  } else {
    stopOnSignal(await start().catch(fail), () => sql.close({ timeout: 1 }));
    console.error(`authorization server: ${issuer}`);
  }
}
