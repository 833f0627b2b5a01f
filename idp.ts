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
 * Run: bun run idp.ts   (bun run secret: make a secret for a client)
 */

import { randomBytes, timingSafeEqual } from "node:crypto";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import * as jose from "jose";
import * as config from "./config.ts";

// --- Data and errors -----------------------------------------------------------------------------

type Settings = config.AuthorizationServerSettings;

/** A registration, made ready for requests: its scopes by resource, and its public keys. */
interface Client extends config.ClientRegistration {
  scopesAt: Map<string, string[]>;
  publicKeys: config.PublicKeys;
}

/** What a running server knows. */
interface Server {
  settings: Settings;
  tokenEndpoint: string;
  clients: Map<string, Client>;
  keyStore: KeyStore;
  lifecycle: config.Lifecycle;
}

const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
/**
 * Choice: an assertion needs a `jti`, and an `exp` at most this far ahead, because it is remembered
 * until it expires.
 */
const assertionMaxSeconds = 600;
/** With a public issuer no shorter secret is accepted. `bun run secret` makes 43 characters. */
const minSecretCharacters = 32;
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/**
 * RFC 6749 §5.2, RFC 8707 §2, RFC 9449 §5: each code with its status and a constant text. The
 * reason of a refusal goes to the log. The first and the last code are not of these RFCs; for the
 * caller the first one is invalid_request.
 */
const errors = {
  not_a_form: [400, "The content type must be application/x-www-form-urlencoded."],
  invalid_request: [400, "The request is malformed, repeats a parameter or authenticates twice."],
  invalid_client: [401, "Client authentication failed. The log of the server has the reason."],
  unauthorized_client: [400, "The client is not registered for this grant type."],
  unsupported_grant_type: [400, "The only grant type here is client_credentials."],
  invalid_scope: [400, "The scope is unknown, not granted, or belongs to several resources."],
  invalid_target: [400, "The resource is unknown, repeated, or one without a granted scope."],
  invalid_dpop_proof: [400, "The DPoP proof is missing or not valid."],
  temporarily_unavailable: [503, "The server cannot answer this now. Try again soon."],
} as const;

type ErrorCode = keyof typeof errors;
const refuseAs = config.refuseAs<ErrorCode>;

function check(holds: unknown, code: ErrorCode, reason: string): asserts holds {
  if (!holds) throw new config.Refusal(code, reason);
}

/**
 * Logs and answers a refusal: of a token request (RFC 6749 §5.2), or of the JWK Set while there is
 * no key to publish, which the log calls "token refused" as well.
 */
function refuse(issuer: string, refusal: config.Refusal, log: config.RequestLog): Response {
  const code = refusal.code as ErrorCode;
  log("token refused", { ...refusal.details, error: code, reason: refusal.message });
  const [status, error_description] = errors[code];
  const headers = new Headers(config.noStore);
  // RFC 6749 §5.2: a 401 carries a challenge; RFC 7617 §2: that of Basic needs a realm.
  if (status === 401) headers.set("www-authenticate", `Basic realm="${issuer}", charset="UTF-8"`);
  if (status === 503) headers.set("retry-after", "5"); // seconds, RFC 9110 §10.2.3
  const error = code === "not_a_form" ? "invalid_request" : code;
  return Response.json({ error, error_description }, { status, headers });
}

// --- Token endpoint ------------------------------------------------------------------------------

/** Answers a token request (RFC 6749 §4.4) in steps, each of which refuses what it finds wrong. */
async function token(server: Server, request: Request, log: config.RequestLog) {
  const form = await parseForm(request).catch(refuseAs("invalid_request", "The body"));
  const authorization = request.headers.get("authorization");
  const credentials = await presentedCredentials(authorization, form);
  const registered = server.clients.get(credentials.client_id);
  try {
    const client = await authenticate(server, registered, credentials);
    checkGrantType(client, form.get("grant_type"));
    const jkt = await boundKey(server, client, request.headers.get("dpop"));
    const resource = resourceFor(client, form);
    const scope = scopeAt(client, resource, form.get("scope"));
    const { response, kid, jti } = await issue(server, client, resource, scope, jkt);
    log("token issued", { client_id: client.client_id, scope, kid, jti });
    return Response.json(response, { headers: config.noStore });
  } catch (error) {
    // An id that is not registered is not logged: it may be a secret in the wrong place.
    if (error instanceof config.Refusal) error.details["client_id"] = registered?.client_id;
    throw error;
  }
}

function checkGrantType({ grant_types }: Client, grant_type: string | undefined): void {
  check(grant_type, "invalid_request", "The request has no grant_type.");
  const reason = `The grant_type is ${grant_type.slice(0, 100)}.`;
  check(grant_type === "client_credentials", "unsupported_grant_type", reason);
  check(grant_types.includes(grant_type), "unauthorized_client", "The grant is not registered.");
}

/** Which API the token is for: the one that is named (RFC 8707 §2), or where the scope belongs. */
function resourceFor({ scopesAt }: Client, form: Form): string {
  const named = form.get("resource");
  check(!named || scopesAt.has(named), "invalid_target", "The client has no scope there.");
  if (named) return named;
  // Choice: RFC 6749 §3.3 leaves open what no scope means. Here it is all that the client has, if
  // that is at one resource. Else the first scope says which resource; scopeAt checks the others.
  const [first] = form.get("scope")?.split(" ") ?? [];
  const fits = (resource: string) => !first || scopesAt.get(resource)?.includes(first);
  const [found, ...others] = [...scopesAt.keys()].filter(fits);
  check(found, "invalid_scope", `The client may not have scope ${first?.slice(0, 100)}.`);
  check(others.length === 0, "invalid_scope", "The client has several APIs, and names none.");
  return found;
}

/** The scope of the token (RFC 6749 §3.3): all that was requested, or a refusal. */
function scopeAt({ scopesAt }: Client, resource: string, requested: string | undefined): string {
  const granted = scopesAt.get(resource) ?? [];
  const scopes = [...new Set(requested?.split(" ") ?? granted)];
  const areGranted = scopes.every((scope) => granted.includes(scope));
  const reason = `The client may not have all of scope ${requested?.slice(0, 100)} at ${resource}.`;
  check(areGranted, "invalid_scope", reason);
  return scopes.join(" ");
}

/** A signed access token (RFC 9068 §2) in its response (RFC 6749 §5.1). */
async function issue(server: Server, client: Client, aud: string, scope: string, jkt?: string) {
  const { client_id, access_token_lifetime_seconds } = client;
  const iat = config.secondsAt(server.settings.clock);
  const signingKey = server.keyStore.signingKey(iat);
  check(signingKey, "temporarily_unavailable", "There is no key to sign with.");
  const { alg, kid, privateKey, removed_at } = signingKey;
  // Once the key is removed, nobody can verify the token. A key keeps the dates that it was made
  // with, so it may be removed before a lifetime is over that the settings have now.
  const exp = Math.min(iat + access_token_lifetime_seconds, removed_at);
  const jti = crypto.randomUUID();
  const identity = { iss: server.settings.issuer, sub: client_id, aud, client_id, scope };
  // JSON leaves out what is undefined.
  const claims = { ...identity, iat, nbf: iat, exp, jti, cnf: jkt && { jkt }, ...client.claims };
  const jwt = new jose.SignJWT(claims).setProtectedHeader({ alg, kid, typ: "at+jwt" });
  const access_token = await jwt.sign(privateKey);
  const token_type = jkt ? "DPoP" : "Bearer";
  return { response: { access_token, token_type, expires_in: exp - iat, scope }, kid, jti };
}

// --- Parsing a token request ---------------------------------------------------------------------

/** What the token endpoint reads; all other parameters are ignored (RFC 6749 §3.2). */
const parameterNames = [
  "grant_type",
  "scope",
  "resource",
  "client_id",
  "client_secret",
  "client_assertion_type",
  "client_assertion",
];

/** The parameters that have a value, by their names. */
type Form = Map<string, string>;

/** By hand, for URLSearchParams silently repairs what is malformed. */
async function parseForm(request: Request): Promise<Form> {
  const contentType = request.headers.get("content-type") ?? "missing";
  const mediaType = contentType.split(";")[0]?.trim().toLowerCase();
  const reason = `The content type is ${contentType.slice(0, 100)}.`;
  check(mediaType === "application/x-www-form-urlencoded", "not_a_form", reason);
  const body = utf8.decode(await request.bytes());
  const form: Form = new Map();
  for (const pair of body.split("&")) {
    const [name, value] = splitOnce(pair, "=").map(formDecode);
    const isWellFormed = name !== undefined && value !== undefined;
    check(isWellFormed, "invalid_request", "A parameter has malformed percent-encoding, or a NUL.");
    if (!parameterNames.includes(name)) continue;
    // RFC 8707 §2 allows several resources; this server has one API in a token.
    const code = name === "resource" ? "invalid_target" : "invalid_request";
    check(!form.has(name), code, `The parameter ${name} is repeated.`);
    form.set(name, value);
  }
  // RFC 6749 §3.2: "Parameters sent without a value MUST be treated as if they were omitted".
  for (const [name, value] of form) if (value === "") form.delete(name);
  return form;
}

/** The text before and after the first separator. */
function splitOnce(text: string, separator: string): [string, string] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

/** RFC 6749 Appendix B. Undefined for malformed percent-encoding, and for a NUL. */
function formDecode(text: string): string | undefined {
  try {
    const decoded = decodeURIComponent(text.replaceAll("+", " "));
    return decoded.includes("\0") ? undefined : decoded;
  } catch {
    return undefined;
  }
}

/** `raw` is the secret as it stood in Basic, before it was form-decoded. */
type Secret = { kind: "secret"; client_id: string; secret: string; raw: string };
type Assertion = { kind: "assertion"; client_id: string; assertion: string };
type Credentials = Secret | Assertion | { kind: "none"; client_id: string };

/** The credentials of a request, which has one method alone (RFC 6749 §2.3). */
async function presentedCredentials(authorization: string | null, form: Form) {
  const code = "invalid_client";
  const secret = form.get("client_secret");
  // Half of an assertion is an attempt to use one.
  const isAssertion = form.has("client_assertion") || form.has("client_assertion_type");
  const ways = countFields(authorization) + Number(secret !== undefined) + Number(isAssertion);
  check(ways <= 1, "invalid_request", "The request authenticates in more than one way.");
  const client_id = form.get("client_id") ?? "";
  let credentials: Credentials = { kind: "none", client_id };
  if (secret) credentials = { kind: "secret", client_id, secret, raw: secret };
  if (isAssertion)
    credentials = await assertionCredentials(form).catch(refuseAs(code, "The client_assertion"));
  if (authorization)
    credentials = await basicCredentials(authorization).catch(refuseAs(code, "The Basic field"));
  const isSame = client_id === "" || credentials.client_id === client_id;
  check(isSame, "invalid_request", "The client_id and the credentials differ.");
  return credentials;
}

/**
 * How many Authorization fields came. Several arrive as one, joined by commas. A comma joins two
 * fields if a scheme follows: a word, and then a space or the end.
 */
function countFields(authorization: string | null): number {
  const withoutQuotedText = authorization?.replace(/"[^"]*"/g, "");
  return withoutQuotedText?.split(/, *(?=[^\s=,"]+(?: |$))/).length ?? 0;
}

/**
 * RFC 6749 §2.3.1: id and secret are form-encoded within the credentials of RFC 7617 §2. It is
 * async so that one `.catch` takes all that is thrown, also by a decoder.
 */
async function basicCredentials(authorization: string): Promise<Credentials> {
  const [, encoded] = /^Basic +(\S+)$/i.exec(authorization) ?? [];
  check(encoded, "invalid_client", "The Authorization field has no Basic credentials.");
  const pair = utf8.decode(Uint8Array.fromBase64(encoded));
  check(pair.includes(":"), "invalid_client", "The Basic credentials have no colon.");
  const [id, raw] = splitOnce(pair, ":");
  const client_id = formDecode(id);
  check(client_id, "invalid_client", "The client_id in Basic is empty or malformed.");
  // A malformed secret becomes an empty one, which verifySecret refuses.
  return { kind: "secret", client_id, secret: formDecode(raw) ?? "", raw };
}

/** RFC 7523 §2.2: whom an assertion names, before it is verified. */
async function assertionCredentials(form: Form): Promise<Credentials> {
  const isBearer = form.get("client_assertion_type") === jwtBearer;
  check(isBearer, "invalid_client", `The client_assertion_type is not ${jwtBearer}.`);
  const assertion = form.get("client_assertion") ?? "";
  return { kind: "assertion", client_id: String(jose.decodeJwt(assertion).sub), assertion };
}

// --- Client authentication and proof of possession -----------------------------------------------

/** Resolves with the client if the credentials are its own. */
async function authenticate(server: Server, client: Client | undefined, credentials: Credentials) {
  check(credentials.kind !== "none", "invalid_client", "The request has no credentials.");
  // An unknown client's secret is compared too, so that the time does not tell that it is unknown.
  if (credentials.kind === "secret") verifySecret(server.settings, client, credentials);
  check(client, "invalid_client", "The client is unknown.");
  if (credentials.kind === "assertion")
    await verifyAssertion(server, client, credentials.assertion);
  return client;
}

/** Compared with where a client is unknown or has no secret: as long as a hash, equal to none. */
const dummySecrets: { sha256: string; expires_at?: number }[] = [{ sha256: " ".repeat(44) }];

/** Compares by SHA-256, in constant time. Throws a refusal unless the secret is right. */
function verifySecret(settings: Settings, client: Client | undefined, { secret, raw }: Secret) {
  // RFC 6749 §2.3.1: "the authorization server MUST protect any endpoint utilizing it against brute
  // force attacks". Choice: no throttle, for any throttle locks somebody out. With a public issuer
  // no weak secret is in use instead, so that nobody can guess one.
  // A malformed secret is empty; then its raw length counts, so that the log says what is wrong.
  const isLong = (secret || raw).length >= minSecretCharacters;
  const isAllowed = isLong || config.isLoopback(new URL(settings.issuer));
  check(isAllowed, "invalid_client", `The secret has under ${minSecretCharacters} characters.`);
  const registered = client?.client_secrets?.length ? client.client_secrets : dummySecrets;
  const equalTo = (text: string) => {
    const presented = Buffer.from(config.sha256(text, "base64"));
    return registered.filter(({ sha256 }) => timingSafeEqual(Buffer.from(sha256), presented));
  };
  const matching = equalTo(secret);
  const now = config.secondsAt(settings.clock);
  // An empty secret is right for nobody, even if somebody registered its hash.
  if (secret && matching.some(({ expires_at = Infinity }) => expires_at > now)) return;
  const isRaw = equalTo(raw).length > 0;
  check(client, "invalid_client", "The client is unknown.");
  check(matching.length === 0, "invalid_client", "The secret has expired.");
  check(!isRaw, "invalid_client", "The secret is right, but not form-encoded (RFC 6749 §2.3.1).");
  throw new config.Refusal<ErrorCode>("invalid_client", "The secret is wrong.");
}

/** private_key_jwt: RFC 7523 §3, and stricter where its successor is, the draft rfc7523bis. */
async function verifyAssertion({ settings, keyStore }: Server, client: Client, assertion: string) {
  const { client_id, publicKeys, token_endpoint_auth_signing_alg: alg } = client;
  const code = "invalid_client";
  const names = { issuer: client_id, subject: client_id, requiredClaims: ["exp"] };
  const rules = { ...config.jwtRules(settings), ...names, ...(alg && { algorithms: [alg] }) };
  const verifying = jose.jwtVerify(assertion, publicKeys.find, rules);
  const { payload, protectedHeader } = await verifying.catch(refuseAs(code, "The assertion"));
  // Checked after the signature, for only then the keys of a jwks_uri are there to be counted.
  const isNamed = protectedHeader.kid || publicKeys.keys.length === 1;
  check(isNamed, code, "The assertion does not say which of several keys it is by.");
  checkAssertion(settings, payload, protectedHeader.typ);
  const { exp = 0, jti } = payload;
  check(config.isText(jti), code, "The assertion has no jti.");
  const expires_at = exp + config.leewaySeconds;
  const isNew = await keyStore.useOnce(["assertion", client_id, jti], expires_at);
  check(isNew, code, "The jti of the assertion was used before.");
}

/** What RFC 7523 §3 wants of an assertion and jose does not check. */
function checkAssertion({ issuer, clock }: Settings, claims: jose.JWTPayload, typ = "JWT") {
  const { aud, exp = 0, iat = 0 } = claims;
  const code = "invalid_client";
  // RFC 8725 §3.11: a JWT of another kind is no assertion.
  const kinds = /^(application\/)?(jwt|client-authentication\+jwt)$/i;
  const isAssertion = config.isText(typ) && kinds.test(typ);
  check(isAssertion, code, `The assertion has typ ${JSON.stringify(typ)}.`);
  // Choice: stricter than RFC 7523 §3. The URL of the token endpoint would let another server that
  // names it as its own use the assertion here.
  const isForUs = aud === issuer || Bun.deepEquals(aud, [issuer]);
  check(isForUs, code, `The assertion has aud ${JSON.stringify(aud)}, not ${issuer} alone.`);
  const latest = config.secondsAt(clock) + config.leewaySeconds;
  check(exp <= latest + assertionMaxSeconds, code, "The exp of the assertion is too far ahead.");
  check(iat <= latest, code, "The iat of the assertion is in the future.");
}

/** The thumbprint of the key that the token will be bound to, if it will be bound (RFC 9449 §5). */
async function boundKey(server: Server, client: Client, proof: string | null) {
  if (proof !== null) return await verifyProof(server, proof);
  check(!client.dpop_bound_access_tokens, "invalid_dpop_proof", "The client must send a proof.");
  return undefined;
}

/**
 * RFC 9449 §4.3: the thumbprint of the key that a proof shows the client to have. The API has such
 * a function of its own, for it checks more, refuses otherwise, and may be on another machine.
 */
async function verifyProof({ settings, tokenEndpoint, keyStore }: Server, proof: string) {
  const code = "invalid_dpop_proof";
  const rules = { ...config.jwtRules(settings), ...config.proofRules };
  const verifying = jose.jwtVerify(proof, config.proofKey, rules);
  const { payload, protectedHeader } = await verifying.catch(refuseAs(code, "The DPoP proof"));
  const { htm, htu, iat = 0, jti } = payload;
  // §4.3 (9): without query and fragment, normalized by `new URL`.
  const [target] = URL.parse(config.isText(htu) ? htu : "")?.href.split(/[?#]/) ?? [];
  const isForUs = htm === "POST" && target === tokenEndpoint;
  const named = JSON.stringify([htm, htu]);
  check(isForUs, code, `The DPoP proof is for ${named}, this is POST ${tokenEndpoint}.`);
  check(config.isText(jti), code, "The DPoP proof has no jti.");
  const jkt = await jose.calculateJwkThumbprint(protectedHeader.jwk as jose.JWK);
  const expires_at = iat + config.proofMaxAgeSeconds;
  const isNew = await keyStore.useOnce(["dpop", jkt, tokenEndpoint, jti], expires_at);
  check(isNew, code, "The DPoP proof was used before.");
  return jkt;
}

// --- Documents and routes ------------------------------------------------------------------------

/** RFC 8414 §2, made from the settings: what is advertised is what is done. */
function metadata({ settings, tokenEndpoint }: Server): object {
  const { issuer, scopes, acceptedAlgorithms } = settings;
  const authenticationMethods = ["client_secret_basic", "client_secret_post", "private_key_jwt"];
  return {
    issuer,
    jwks_uri: `${config.metadataUrl(issuer)}/jwks`,
    token_endpoint: tokenEndpoint,
    scopes_supported: scopes.map(({ scope }) => scope),
    response_types_supported: [], // Choice: §2 requires it, though §3.2 would omit an empty one
    grant_types_supported: ["client_credentials"],
    token_endpoint_auth_methods_supported: authenticationMethods,
    token_endpoint_auth_signing_alg_values_supported: acceptedAlgorithms,
    dpop_signing_alg_values_supported: acceptedAlgorithms,
    protected_resources: [...new Set(scopes.map(({ resource }) => resource))], // RFC 9728 §4
  };
}

const jwkSet = ({ keyStore }: Server) => ({ keys: keyStore.publishedKeys() });

/** Whether this instance should get requests. */
function health({ keyStore, lifecycle }: Server): Response {
  const isReady = !lifecycle.isStopping && keyStore.signingKey();
  const whenReady = keyStore.isHealthy ? "ok" : "degraded";
  const init = { status: isReady ? 200 : 503, headers: config.noStore };
  return Response.json({ status: isReady ? whenReady : "unavailable" }, init);
}

/** What the server answers, below the path of the issuer. */
function routes(server: Server): config.Routes {
  return {
    "POST /connect/token": (request, log) => token(server, request, log),
    "GET /.well-known/openid-configuration": () => cacheable(server, metadata(server)),
    "GET /.well-known/oauth-authorization-server": () => cacheable(server, metadata(server)),
    "GET /.well-known/openid-configuration/jwks": () => cacheable(server, jwkSet(server)),
    "GET /health": () => health(server),
  };
}

function cacheable({ settings }: Server, document: object): Response {
  const maxAge = `public, max-age=${settings.signingKeys.maxAgeSeconds}`;
  return Response.json(document, { headers: { "cache-control": maxAge } });
}

// --- Key store -----------------------------------------------------------------------------------

const numberColumns = ["generation", "signs_from", "signs_until", "removed_at"] as const;

/** A row of the table: a private JWK, in clear or sealed, and the dates that it was made with. */
type Row = Record<"alg" | "kid" | "jwk", string> & Record<(typeof numberColumns)[number], number>;
type SigningKey = Row & { privateKey: jose.CryptoKey; publicJwk: jose.JWK };
/** Used identifiers that are inserted together; the promise brings the ids that were new. */
type Batch = { rows: { id: string; expires_at: number }[]; inserted: Promise<Set<string>> };

const tables = `
  CREATE TABLE IF NOT EXISTS signing_keys (
    alg TEXT, generation BIGINT, kid TEXT NOT NULL, jwk TEXT NOT NULL, signs_from BIGINT NOT NULL,
    signs_until BIGINT NOT NULL, removed_at BIGINT NOT NULL, PRIMARY KEY (alg, generation));
  CREATE TABLE IF NOT EXISTS used_jtis (id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL);
  CREATE INDEX IF NOT EXISTS used_jtis_expires_at ON used_jtis (expires_at)`;
/** How long a request or a poll waits for the database. */
const queryMilliseconds = 2_000;
/** Rows are deleted this late, so that instances whose clocks differ forget nothing early. */
const sweepDelaySeconds = 900;

/** A key that must sign now, but cannot be opened. */
class UnusableKey extends Error {}

/**
 * Whether the same may succeed soon: SQLite is busy, or PostgreSQL is away, starting or crowded, or
 * another instance has just made the same table.
 */
function mayHeal(error: unknown): boolean {
  const { code, errno } = error as { code?: unknown; errno?: unknown };
  if (/^SQLITE/.test(String(code))) return /^SQLITE_BUSY/.test(String(code));
  // An error of PostgreSQL has its code in errno; without one, the connection has failed. Class 08
  // is of PgBouncer without a server behind it, 53 and 57 are of a server that is crowded or stops;
  // the rest are of a table that is there.
  return errno === undefined || /^(08|5[37]|23505|42P07|42710)/.test(String(errno));
}

/**
 * The signing keys, and the identifiers of JWTs that were used, in SQLite or PostgreSQL. Instances
 * on one database share both without a lock or a leader: a primary key decides which one is first.
 */
class KeyStore {
  /** Whether the database answered last time, to a read and to a write. */
  isHealthy = true;
  readonly #settings: Settings;
  readonly #log: config.Log;
  readonly #sqliteFile: string | undefined;
  readonly #sealing: Sealing;
  #sql: Bun.SQL;
  /** In the order of their periods, in which `#load` reads them, so that the first one counts. */
  #keys: SigningKey[] = [];
  #polledAt: number;
  #isOpen = false;
  #timer: Timer | undefined;
  #polling: Promise<void> | undefined;
  #nextBatch: Batch | undefined;
  #lastInsert: Promise<unknown> = Promise.resolve();
  readonly #now = () => config.secondsAt(this.#settings.clock);
  // PgBouncer gives each transaction another connection, where a named statement is unknown.
  readonly #connect = () => new Bun.SQL(this.#settings.databaseUrl, { prepare: false });

  constructor(settings: Settings, log: config.Log) {
    this.#settings = settings;
    this.#log = log;
    this.#sealing = new Sealing(settings.keyEncryptionSecret);
    this.#polledAt = this.#now();
    const [, file] = /^sqlite:(?:\/\/)?([^?]+)/.exec(settings.databaseUrl) ?? [];
    this.#sqliteFile = file;
    if (file && file !== ":memory:" && !existsSync(file)) {
      mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
      writeFileSync(file, "", { mode: 0o600, flag: "a" }); // SQLite gives -wal and -shm this mode
    }
    this.#sql = this.#connect();
  }

  /** The key that signs: the one whose period holds, else the one whose period comes next. */
  signingKey(at = this.#now(), alg = this.#settings.signingKeys.algorithms[0]) {
    return this.#keys.find((key) => key.alg === alg && key.signs_until > at);
  }

  /** The public members of every key until it is removed, also of an algorithm used no longer. */
  publishedKeys(): jose.JWK[] {
    const published = this.#keys.filter(({ removed_at }) => removed_at > this.#now());
    // For an API, an empty set would withdraw all keys.
    check(published[0], "temporarily_unavailable", "There is no key to publish.");
    return published.map(({ publicJwk }) => publicJwk);
  }

  /** Opens the database, and makes what is missing in it. Rejects if it cannot be used. */
  async open(): Promise<void> {
    const { databaseUrl, databaseWaitSeconds, signingKeys } = this.#settings;
    const { hostname, port } = URL.parse(databaseUrl) ?? {};
    const [place, remedy] = this.#sqliteFile
      ? [`the database ${this.#sqliteFile}`, "Check its rights; if it is damaged, move it away."]
      : [`PostgreSQL at ${hostname}:${port || 5432}`, "Check that it runs, and DATABASE_URL."];
    const started = performance.now();
    let failures = 0;
    while (!this.#isOpen) {
      try {
        await this.#prepare();
        await this.#refresh();
        this.#isOpen = true;
      } catch (error) {
        if (error instanceof UnusableKey) throw error;
        const reason = config.reasonOf(error);
        const isOver = performance.now() - started > databaseWaitSeconds * 1000;
        if (isOver || !mayHeal(error)) throw new Error(`Cannot use ${place}: ${reason}. ${remedy}`);
        failures++;
        // Machines start in any order. The first failure may be that another instance makes the
        // tables just now, of which a person need not know.
        if (failures === 2 && !this.#sqliteFile) console.error(`Waiting for ${place}: ${reason}.`);
        await Bun.sleep(50);
      }
    }
    this.#timer = setInterval(() => this.#poll(), signingKeys.pollSeconds * 1000).unref();
  }

  async #prepare(): Promise<void> {
    if (this.#sqliteFile) {
      // SQLite blocks the event loop, so it waits 100 ms at most. secure_delete overwrites what is
      // deleted.
      await this.#sql.unsafe("PRAGMA busy_timeout = 100; PRAGMA secure_delete = ON");
      await this.#sql.unsafe("PRAGMA synchronous = NORMAL");
      await this.#sql.unsafe("PRAGMA journal_mode = WAL").catch((error) => {
        // A file that can only be read cannot change its journal mode, and works without.
        if (mayHeal(error)) throw error;
      });
    }
    // Tables that are there are left alone, so that a role without CREATE can run the server.
    const probe = inTime(this.#sql`SELECT 1 FROM signing_keys, used_jtis LIMIT 1`);
    await probe.catch(() => inTime(this.#sql.unsafe(tables)));
  }

  /** One at a time: a poll that is late must not bring back what a newer one has replaced. */
  #poll(): void {
    this.#polling ??= this.#refreshOrReconnect().finally(() => (this.#polling = undefined));
  }

  async #refreshOrReconnect(): Promise<void> {
    try {
      await this.#refresh();
    } catch (error) {
      this.#reportAway(error);
      if (this.#sqliteFile) return;
      this.#sql.close({ timeout: 0 }).catch(() => {}); // its connections may never answer again
      this.#sql = this.#connect();
    }
  }

  #reportAway(error: unknown): void {
    this.isHealthy = false;
    this.#log.write("database away", { reason: config.reasonOf(error) });
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    await this.#polling;
    await this.#sql.close({ timeout: 1 }).catch(() => {});
  }

  /**
   * Reads the table, makes each key that is missing, and deletes what is long over. A database that
   * can be read but not written is enough, as long as there is a key to sign with.
   */
  async #refresh(): Promise<void> {
    const at = this.#now();
    const rows = await this.#load();
    if (!this.#isOpen) this.#requireUsableKeys(rows, at);
    try {
      await this.#sealClearKeys();
      for (const alg of this.#settings.signingKeys.algorithms)
        await this.#makeMissing(alg, at, rows);
      await this.#sweep(at);
      if (!this.isHealthy) this.#log.write("database back", {});
      this.isHealthy = true;
    } catch (error) {
      // At a start it is enough that a key can sign, even if nothing can be written. Later this
      // fails the poll, which reports it and connects anew.
      if (this.#isOpen || !this.signingKey(at) || mayHeal(error)) throw error;
      this.#reportAway(error);
    }
  }

  /** At the start, a key in use that cannot be opened is fatal; later it is logged and skipped. */
  #requireUsableKeys(rows: Row[], at: number): void {
    const remedy = "KEY_ENCRYPTION_SECRET lacks its secret or the word none, or it was altered.";
    for (const alg of this.#settings.signingKeys.algorithms) {
      const inUse = rows.find((row) => row.alg === alg && row.signs_until > at);
      if (inUse && this.signingKey(at, alg)?.generation !== inUse.generation)
        throw new UnusableKey(`The signing key ${inUse.kid} cannot be opened. ${remedy}`);
    }
  }

  /** Reads all rows, and takes over the keys that can be opened. */
  async #load(): Promise<Row[]> {
    const rows: Row[] = await inTime(this.#sql`SELECT * FROM signing_keys
      ORDER BY signs_from, generation`);
    // PostgreSQL gives BIGINT as text.
    for (const row of rows) for (const name of numberColumns) row[name] = Number(row[name]);
    const opened: SigningKey[] = [];
    for (const row of rows) {
      const reportSkipped = (error: unknown) =>
        this.#log.write("key skipped", { kid: row.kid, reason: config.reasonOf(error) });
      await this.#sealing.open(row).then((key) => opened.push(key), reportSkipped);
    }
    for (const { kid, alg } of this.#keys)
      if (!opened.some((key) => key.kid === kid)) this.#log.write("key removed", { kid, alg });
    this.#keys = opened;
    return rows;
  }

  /** Seals keys that rest in clear, so that `none` can leave the list of secrets after a poll. */
  async #sealClearKeys(): Promise<void> {
    // Only keys that were opened: one in clear that the settings do not allow may be a stranger's,
    // and sealing would make it ours.
    for (const row of this.#keys.filter(isClear)) {
      const sealed = await this.#sealing.seal(row);
      if (sealed === row.jwk) continue; // there is no secret to seal it with
      await inTime(this.#sql`UPDATE signing_keys SET jwk = ${sealed}
        WHERE alg = ${row.alg} AND generation = ${row.generation} AND jwk = ${row.jwk}`);
    }
  }

  /**
   * For every algorithm one key must sign, and its successor must be public all that time, so that
   * every API has it before it signs.
   */
  async #makeMissing(alg: string, at: number, rows: Row[]): Promise<void> {
    const [signing, ...later] = this.#keys.filter((key) => key.alg === alg && key.signs_until > at);
    const isFollowed = later.some((key) => signing && key.signs_from === signing.signs_until);
    if (isFollowed) return;
    // Counts all rows, also those that cannot be opened: their number is taken.
    const generations = rows.filter((row) => row.alg === alg).map((row) => row.generation);
    await this.#insertKey(alg, Math.max(0, ...generations) + 1, signing?.signs_until ?? at);
    await this.#makeMissing(alg, at, await this.#load());
  }

  /** Offers a key. If another instance was faster with its own, this one is not needed. */
  async #insertKey(alg: string, generation: number, signs_from: number): Promise<void> {
    const { rotationSeconds, retentionSeconds } = this.#settings.signingKeys;
    const { privateKey } = await jose.generateKeyPair(alg, { extractable: true });
    const jwk = await jose.exportJWK(privateKey);
    const kid = await jose.calculateJwkThumbprint(jwk);
    const signs_until = signs_from + rotationSeconds;
    const dates = { signs_from, signs_until, removed_at: signs_until + retentionSeconds };
    const row = { alg, generation, kid, jwk: JSON.stringify(jwk), ...dates };
    row.jwk = await this.#sealing.seal(row);
    const { count } = await inTime(this.#sql`INSERT INTO signing_keys ${this.#sql(row)}
      ON CONFLICT (alg, generation) DO NOTHING`);
    if (count === 1) this.#log.write("key made", { kid, alg, ...dates });
  }

  /**
   * Deletes what passed a mark, 15 minutes after its end, between the last poll and this one; if
   * they are over 15 minutes apart, nothing. So a clock that jumps ahead once deletes no key in
   * use; only an instance whose clock stays ahead by over 15 minutes does. A key that passed the
   * mark while no poll succeeded stays, unused; an identifier stays for 30 days. Then writes a row
   * of its own, to see that writing works.
   */
  async #sweep(at: number): Promise<void> {
    const since = this.#polledAt - sweepDelaySeconds;
    const until = at - sweepDelaySeconds;
    if (at - this.#polledAt <= sweepDelaySeconds) {
      await inTime(this.#sql`DELETE FROM signing_keys
        WHERE removed_at > ${since} AND removed_at <= ${until}`);
      await inTime(this.#sql`DELETE FROM used_jtis
        WHERE expires_at > ${since} AND expires_at <= ${until} OR expires_at < ${at - 2_592_000}`);
    }
    this.#polledAt = at;
    await inTime(this.#sql`INSERT INTO used_jtis ${this.#sql({ id: "last poll", expires_at: at })}
      ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at`);
    // No private key stays in the journal.
    if (this.#sqliteFile) await this.#sql.unsafe("PRAGMA wal_checkpoint(TRUNCATE)");
  }

  /**
   * Remembers that a JWT was used, for as long as it would be accepted. Resolves with whether it
   * was new, to one caller of all instances. Rejects with a refusal if the database is away.
   */
  async useOnce(identifier: string[], expires_at: number): Promise<boolean> {
    const id = config.sha256(JSON.stringify(identifier), "base64url");
    this.#nextBatch ??= this.#startBatch();
    const { rows, inserted } = this.#nextBatch;
    rows.push({ id, expires_at: Math.ceil(expires_at) });
    // A full batch takes no more, for databases limit the parameters; nor does one under way.
    if (rows.length === 500) this.#nextBatch = undefined;
    const newIds = await inTime(inserted).catch((error: unknown) => {
      this.#reportAway(error);
      throw new config.Refusal<ErrorCode>("temporarily_unavailable", config.reasonOf(error));
    });
    return newIds.delete(id); // of several with one id in a batch, the first is the new one
  }

  /**
   * What arrives while an insert is under way, or within a millisecond, goes together in the next
   * one: a busy server pays one transaction for many requests.
   */
  #startBatch(): Batch {
    const rows: Batch["rows"] = [];
    const deadline = performance.now() + queryMilliseconds;
    const insert = async (): Promise<Set<string>> => {
      if (this.#nextBatch?.rows === rows) this.#nextBatch = undefined;
      // All instances insert in one order, so that no two wait for each other.
      rows.sort((a, b) => (a.id < b.id ? -1 : 1));
      try {
        const found: Batch["rows"] = await inTime(this.#sql`
          INSERT INTO used_jtis ${this.#sql(rows)} ON CONFLICT (id) DO NOTHING RETURNING id`);
        return new Set(found.map(({ id }) => id));
      } catch (error) {
        const isBusy = this.#sqliteFile && mayHeal(error); // another instance is writing
        if (!isBusy || performance.now() > deadline) throw error;
        await Bun.sleep(10);
        return await insert();
      }
    };
    const inserted = Promise.allSettled([this.#lastInsert, Bun.sleep(1)]).then(insert);
    this.#lastInsert = inserted;
    return { rows, inserted };
  }
}

/** Bun.SQL waits for ever for an answer, but a database that is frozen must not hold a request. */
async function inTime<T>(query: Promise<T>): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const reason = `The database did not answer within ${queryMilliseconds} ms`;
  const timeout = setTimeout(reject, queryMilliseconds, new Error(reason));
  return await Promise.race([query, late]).finally(() => clearTimeout(timeout));
}

/** How private keys rest: in clear, or as JWE under the secrets of KEY_ENCRYPTION_SECRET. */
class Sealing {
  readonly #secrets: Uint8Array[];
  readonly #readsClear: boolean;

  constructor(setting: string) {
    const words = setting ? setting.split(",") : [];
    const secrets = words.filter((word) => word !== "none");
    this.#secrets = secrets.map((word) => Buffer.from(word, "base64url"));
    this.#readsClear = secrets.length === 0 || words.includes("none");
    // No word may be empty, for that is what is left of a variable that is not set.
    const areSecrets = secrets.every((word) => /^[\w-]{43}$/.test(word));
    mustHold(areSecrets, "KEY_ENCRYPTION_SECRET must be a secret of `bun run secret`, no hash");
  }

  /** The JWK of a row, sealed with the first secret if there is one. */
  async seal(row: Row): Promise<string> {
    const [secret] = this.#secrets;
    if (!secret) return row.jwk;
    const jwe = new jose.CompactEncrypt(Buffer.from(row.jwk));
    return await jwe.setProtectedHeader(sealedHeader(row)).encrypt(secret);
  }

  /**
   * The key of a row. Rejects for one that cannot be opened, or whose kid is not its own; for a
   * sealed one also if its dates were changed.
   */
  async open(row: Row): Promise<SigningKey> {
    const jwk: jose.JWK = JSON.parse(await this.#unseal(row));
    const kid = await jose.calculateJwkThumbprint(jwk);
    if (kid !== row.kid) throw new Error("The kid is not the thumbprint of the key.");
    const isInOrder = row.signs_from < row.signs_until && row.signs_until <= row.removed_at;
    if (!isInOrder) throw new Error("The dates of the key are out of order.");
    const { kty, crv, x, y, n, e, pub } = jwk; // the public members; JSON omits what is undefined
    const publicJwk = { kty, crv, x, y, n, e, pub, kid, alg: row.alg, use: "sig" } as jose.JWK;
    const privateKey = (await jose.importJWK(jwk, row.alg)) as jose.CryptoKey;
    return { ...row, publicJwk, privateKey };
  }

  async #unseal(row: Row): Promise<string> {
    if (isClear(row)) {
      if (this.#readsClear) return row.jwk;
      throw new Error("The key is not sealed. The word none in KEY_ENCRYPTION_SECRET allows that.");
    }
    const rules = { keyManagementAlgorithms: ["dir"], contentEncryptionAlgorithms: ["A256GCM"] };
    const opening = this.#secrets.map((secret) => jose.compactDecrypt(row.jwk, secret, rules));
    const { plaintext, protectedHeader } = await Promise.any(opening).catch(() => {
      throw new Error("No secret of KEY_ENCRYPTION_SECRET opens the key.");
    });
    // Who can write the table must not be able to bring back a key with other dates.
    const isSame = Bun.deepEquals(protectedHeader, sealedHeader(row));
    if (!isSame) throw new Error("The kid or the dates are not those that were sealed.");
    return utf8.decode(plaintext);
  }
}

const isClear = ({ jwk }: Row) => jwk.startsWith("{");

function sealedHeader({ alg: key_alg, kid, signs_from, signs_until, removed_at }: Row) {
  return { alg: "dir", enc: "A256GCM", kid, key_alg, signs_from, signs_until, removed_at };
}

// --- Checking the settings -----------------------------------------------------------------------

/** The claims that this server sets itself (RFC 9068 §2.2, RFC 7800 §3.1). */
const ownClaims = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"];

/** Throws an Error that names the field unless the rule holds. */
function mustHold(holds: unknown, rule: string): void {
  if (!holds) throw new Error(`config.ts: ${rule}.`);
}

function checkSettings({ databaseUrl, acceptedAlgorithms, signingKeys, scopes }: Settings): void {
  const { algorithms, rotationSeconds, retentionSeconds } = signingKeys;
  const { pollSeconds, maxAgeSeconds, refreshSeconds, coolDownSeconds } = signingKeys;
  // Bun.SQL trims it, and takes sqlite: without a name, and sqlite:memory, for one in memory.
  const known = /^(sqlite:(?!memory$)(\/\/)?(\/?[^/?:\s]|:memory:)|postgres(ql)?:.)(.*\S)?$/;
  mustHold(known.test(databaseUrl), "DATABASE_URL must be sqlite: with a file, or postgres:");
  const delays = [pollSeconds, maxAgeSeconds, refreshSeconds, coolDownSeconds];
  // The table has whole seconds. A timer takes no delay of over 24 days.
  const areWhole = [rotationSeconds, retentionSeconds].every((s) => Number.isInteger(s) && s > 0);
  mustHold(areWhole, "signingKeys: rotation and retention must be whole seconds over 0");
  const areDelays = pollSeconds <= sweepDelaySeconds && delays.every((s) => s > 0 && s < 2_100_000);
  mustHold(areDelays, "signingKeys: each delay must be over 0, a poll at most 900 s");
  // A successor must have reached every cache before it signs; twice, for a margin.
  const caches = 2 * delays.reduce((sum, seconds) => sum + seconds);
  mustHold(rotationSeconds > caches, `signingKeys.rotationSeconds must be over ${caches}`);
  const areAccepted = algorithms.every((alg) => acceptedAlgorithms.includes(alg));
  mustHold(algorithms[0] && areAccepted, "signingKeys.algorithms must be of acceptedAlgorithms");
  for (const { scope, resource } of scopes) {
    const isUri = URL.canParse(resource) && !resource.includes("#"); // RFC 8707 §2
    const isUnique = scopes.filter((other) => other.scope === scope).length === 1;
    mustHold(isUri && isUnique, `scopes: ${scope}: needs one resource, which is a URI`);
  }
}

function checkClient(client: config.ClientRegistration, settings: Settings): void {
  const { client_id, client_secrets = [], jwks, jwks_uri, claims = {} } = client;
  const { token_endpoint_auth_signing_alg: alg, access_token_lifetime_seconds: lifetime } = client;
  const rule = (holds: unknown, text: string) => mustHold(holds, `clients: ${client_id}: ${text}`);
  const isUnique = settings.clients.filter((other) => other.client_id === client_id).length === 1;
  rule(client_id && isUnique, "client_id is empty or there twice");
  const scopes = settings.scopes.map(({ scope }) => scope);
  const areScopes = client.scope.split(" ").every((name) => scopes.includes(name));
  rule(areScopes, "scope is not in scopes");
  rule(!ownClaims.some((name) => name in claims), "claims has a reserved name");
  rule(client_secrets[0] || jwks?.keys[0] || jwks_uri, "needs client_secrets, jwks or jwks_uri");
  rule(!jwks || !jwks_uri, "must not have both jwks and jwks_uri"); // RFC 7591 §2
  const isPrivate = (jwk: jose.JWK) => config.privateMembers.some((name) => name in jwk);
  rule(!jwks?.keys.some(isPrivate), "jwks has a private key");
  const isAccepted = !alg || settings.acceptedAlgorithms.includes(alg);
  rule(isAccepted, "token_endpoint_auth_signing_alg is not in acceptedAlgorithms");
  const { retentionSeconds } = settings.signingKeys;
  const isLifetime = Number.isInteger(lifetime) && lifetime > 0 && lifetime <= retentionSeconds;
  rule(isLifetime, "access_token_lifetime_seconds must be 1 to signingKeys.retentionSeconds");
  const [uri] = jwks_uri?.split("?") ?? [];
  if (uri) config.parseServerUrl(`config.ts: clients: ${client_id}: jwks_uri`, uri, "other");
  for (const { sha256, expires_at = 0 } of client_secrets) {
    rule(/^[A-Za-z0-9+/]{43}=$/.test(sha256), "client_secrets: sha256 is no hash in base64");
    // In milliseconds it would be beyond the year 5000.
    rule(expires_at < 100_000_000_000, "client_secrets: expires_at must be in seconds since 1970");
  }
}

/** A registration with what a request needs of it. */
function readyClient(client: config.ClientRegistration, settings: Settings): Client {
  const { scopes, signingKeys, tls, clock } = settings;
  const { scope, jwks, jwks_uri } = client;
  const resources = new Map(scopes.map((entry) => [entry.scope, entry.resource]));
  const scopesAt = Map.groupBy(scope.split(" "), (name) => resources.get(name) ?? "");
  const fetchKeys = async (signal: AbortSignal) =>
    jwks_uri ? await config.fetchJwkSet(jwks_uri, signal, tls) : (jwks?.keys ?? []);
  const { refreshSeconds, coolDownSeconds } = signingKeys;
  // The last known keys count for a day, as at the API (keepKeysSeconds).
  const ages = { coolDownSeconds, refetchAfterSeconds: refreshSeconds, keepSeconds: 86_400 };
  return { ...client, scopesAt, publicKeys: new config.PublicKeys({ fetchKeys, ...ages, clock }) };
}

// --- Start ---------------------------------------------------------------------------------------

/**
 * Starts the server. Rejects with an Error for a mistake in the settings and a database out of
 * reach. An `issuer` with port 0 takes a free port.
 */
export async function start(settings = config.authorizationServer) {
  const ownUrl = config.parseServerUrl("ISSUER", settings.issuer, "own");
  const listening = await config.listenOptions("ISSUER", ownUrl, settings);
  checkSettings(settings);
  for (const client of settings.clients) checkClient(client, settings);
  const clients = new Map(settings.clients.map((c) => [c.client_id, readyClient(c, settings)]));
  const log = new config.Log(settings.log);
  const lifecycle = new config.Lifecycle(log, (refusal, write) => refuse(issuer, refusal, write));
  const keyStore = new KeyStore(settings, log);
  await keyStore.open();
  const http = Bun.serve({
    ...listening,
    development: false,
    maxRequestBodySize: 16_384,
    fetch: (request, listener) => lifecycle.answer(route, request, listener),
  });
  // Only now the port is known. No request arrives before the lines below have run.
  const issuer = config.urlOf(settings.issuer, http);
  const tokenEndpoint = `${issuer}/connect/token`;
  const server = { settings: { ...settings, issuer }, tokenEndpoint, clients, keyStore, lifecycle };
  const route = config.router(issuer, routes(server));
  const stop = async () => {
    await lifecycle.stop(http, settings.drainSeconds);
    await keyStore.close();
  };
  return { url: issuer, server: http, stop };
}

if (import.meta.main) {
  if (process.argv.includes("--new-secret")) {
    const secret = randomBytes(32).toString("base64url");
    console.log(`secret: ${secret}\nsha256: ${config.sha256(secret, "base64")}`);
  } else {
    await config.runProgram("authorization server", start);
  }
}
