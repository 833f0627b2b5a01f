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

import { randomBytes, timingSafeEqual } from "node:crypto";
import { closeSync, mkdirSync, openSync } from "node:fs";
import { dirname } from "node:path";
import * as jose from "jose";
import * as config from "./config.ts";

// --- Data and errors -----------------------------------------------------------------------------

type Settings = config.AuthorizationServerSettings;

/** A registration, made ready for requests. */
interface Client extends config.ClientRegistration {
  /** The scopes that it may have, by the resource that they belong to. */
  scopesAt: Map<string, string[]>;
  /** Its public keys, for assertions. */
  publicKeys?: { find: jose.JWTVerifyGetKey; count: () => number };
}

/** What a running server knows. */
interface Server {
  settings: Settings;
  tokenEndpoint: string;
  clients: Map<string, Client>;
  keyStore: KeyStore;
  lifecycle: config.Lifecycle;
  log: config.Log;
}

const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
/** How far ahead the `exp` of an assertion may be. */
const assertionMaxSeconds = 600;
/** With a public issuer no shorter secret is accepted. `bun run secret` makes 43 characters. */
const minSecretCharacters = 32;
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/**
 * RFC 6749 §5.2, RFC 8707 §2, RFC 9449 §5: each code with its status and a constant text. The reason
 * of a refusal goes to the log.
 */
const errors = {
  not_a_form: [400, "The content type must be application/x-www-form-urlencoded."], // for the log
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

/** Why a token request is turned away. */
class TokenRefusal extends config.Refusal<ErrorCode> {}

function check(holds: unknown, code: ErrorCode, reason: string): asserts holds {
  if (!holds) throw new TokenRefusal(code, reason);
}

/** For what jose throws about a thing: makes it a refusal with this code. */
const refuseAs = (code: ErrorCode, thing: string) => (error: unknown) => {
  const reason = config.reasonOf(error);
  if (error instanceof config.KeysUnavailable)
    throw new TokenRefusal("temporarily_unavailable", reason);
  throw new TokenRefusal(code, `${thing} is not valid: ${reason}.`);
};

// --- Token endpoint ------------------------------------------------------------------------------

/** Answers a token request (RFC 6749 §4.4), and logs what it answered. */
async function token(server: Server, request: Request, address?: string): Promise<Response> {
  const started = performance.now();
  const log = (event: string, details: Record<string, unknown>) => {
    const milliseconds = Math.round(performance.now() - started);
    server.log.write(event, { address, ...details, milliseconds });
  };
  try {
    const { response, details } = await grant(server, request);
    log("token issued", details);
    return Response.json(response, { headers: config.noStore });
  } catch (error) {
    if (!(error instanceof TokenRefusal)) throw error;
    const { code, message: reason, details } = error;
    log("token refused", { ...details, error: code, reason });
    return refusalAnswer(server.settings.issuer, code);
  }
}

function refusalAnswer(issuer: string, code: ErrorCode): Response {
  const [status, error_description] = errors[code];
  const headers = new Headers(config.noStore);
  // RFC 6749 §5.2: a 401 carries a challenge; RFC 7617 §2: that of Basic needs a realm.
  if (status === 401) headers.set("www-authenticate", `Basic realm="${issuer}", charset="UTF-8"`);
  if (status === 503) headers.set("retry-after", "5"); // seconds, RFC 9110 §10.2.3
  const error = code === "not_a_form" ? "invalid_request" : code;
  return Response.json({ error, error_description }, { status, headers });
}

/** The steps of a token request, each of which refuses what it finds wrong. */
async function grant(server: Server, request: Request) {
  const body = await request.text().catch(refuseAs("invalid_request", "The body"));
  const form = parseForm(request.headers.get("content-type"), body);
  const credentials = presentedCredentials(request.headers.get("authorization"), form.parameters);
  const client = server.clients.get(credentials.client_id);
  try {
    const authenticated = await authenticate(server, client, credentials);
    checkGrantType(authenticated, form.parameters.get("grant_type"));
    const jkt = await boundKey(server, authenticated, request.headers.get("dpop"));
    const resource = resourceFor(authenticated, form);
    const scope = scopeAt(authenticated, resource, form.parameters.get("scope"));
    return await issue(server, authenticated, resource, scope, jkt);
  } catch (error) {
    // An id that is not registered is not logged: it may be a secret in the wrong place.
    if (error instanceof TokenRefusal) error.details["client_id"] = client?.client_id;
    throw error;
  }
}

function checkGrantType({ grant_types }: Client, grant_type: string | undefined): void {
  check(grant_type, "invalid_request", "The request has no grant_type.");
  const reason = `The grant_type is ${grant_type.slice(0, 100)}.`;
  check(grant_type === "client_credentials", "unsupported_grant_type", reason);
  check(grant_types.includes(grant_type), "unauthorized_client", "The grant is not registered.");
}

/** Which API the token is for (RFC 8707 §2): the one that is named, or where the scope belongs. */
function resourceFor({ scopesAt }: Client, { parameters, resources }: Form): string {
  check(resources.length <= 1, "invalid_target", "The request names several resources.");
  const [named] = resources;
  if (named) {
    check(scopesAt.has(named), "invalid_target", "The client has no scope at that resource.");
    return named;
  }
  const [first] = parameters.get("scope")?.split(" ") ?? [];
  // Choice: RFC 6749 §3.3 leaves open what no scope means. Here it is all that the client has, if
  // that is at one resource.
  const fitting = [...scopesAt].filter(([, names]) => first === undefined || names.includes(first));
  const [found, ...others] = fitting;
  check(found, "invalid_scope", `The client may not have scope ${first?.slice(0, 100)}.`);
  check(others.length === 0, "invalid_scope", "The client has several APIs, and names none.");
  return found[0];
}

/** The scope of the token (RFC 6749 §3.3): all that was requested, or a refusal. */
function scopeAt({ scopesAt }: Client, resource: string, requested: string | undefined): string {
  const granted = scopesAt.get(resource) ?? [];
  const scopes = new Set(requested?.split(" ") ?? granted);
  for (const scope of scopes) {
    const reason = `The client may not have scope ${scope.slice(0, 100)} at ${resource}.`;
    check(granted.includes(scope), "invalid_scope", reason);
  }
  return [...scopes].join(" ");
}

/** A signed access token (RFC 9068 §2) in its response (RFC 6749 §5.1), and what is logged of it. */
async function issue(server: Server, client: Client, aud: string, scope: string, jkt?: string) {
  const { client_id, access_token_lifetime_seconds } = client;
  const iat = config.secondsAt(server.settings.clock);
  const signingKey = server.keyStore.signingKey(iat);
  check(signingKey, "temporarily_unavailable", "There is no key to sign with.");
  const { alg, kid, privateKey, removed_at } = signingKey;
  // Once the key is gone, nobody can verify the token.
  const exp = Math.min(iat + access_token_lifetime_seconds, removed_at);
  const jti = crypto.randomUUID();
  const identity = { iss: server.settings.issuer, sub: client_id, aud, client_id, scope };
  const binding = jkt ? { cnf: { jkt } } : {};
  const claims = { ...identity, iat, nbf: iat, exp, jti, ...binding, ...client.claims };
  const jwt = new jose.SignJWT(claims).setProtectedHeader({ alg, kid, typ: "at+jwt" });
  const access_token = await jwt.sign(privateKey);
  const token_type = jkt ? "DPoP" : "Bearer";
  const response = { access_token, token_type, expires_in: exp - iat, scope };
  return { response, details: { client_id, scope, kid, jti } };
}

// --- Parsing a token request ---------------------------------------------------------------------

/** What the token endpoint reads; all other parameters are ignored (RFC 6749 §3.2). */
const parameterNames = [
  ...["grant_type", "scope", "resource", "client_id", "client_secret"],
  ...["client_assertion", "client_assertion_type"],
];

/** The parameters that have a value; of `resource` all, for it may repeat (RFC 8707 §2). */
interface Form {
  parameters: Map<string, string>;
  resources: string[];
}

/** By hand, for URLSearchParams silently repairs what is malformed. */
function parseForm(contentType: string | null, body: string): Form {
  const mediaType = contentType?.split(";")[0]?.trim().toLowerCase();
  const reason = `The content type is ${contentType?.slice(0, 100) ?? "missing"}.`;
  check(mediaType === "application/x-www-form-urlencoded", "not_a_form", reason);
  // text() puts this character for bytes that are not UTF-8.
  check(!body.includes("\uFFFD"), "invalid_request", "The body is not UTF-8.");
  const parameters = new Map<string, string>();
  const resources: string[] = [];
  for (const pair of body.split("&")) {
    const [name, value] = splitOnce(pair, "=").map(formDecode);
    const isDecoded = name !== undefined && value !== undefined;
    check(isDecoded, "invalid_request", "The body has malformed percent-encoding or a NUL.");
    if (name === "resource") resources.push(value);
    if (name === "resource" || !parameterNames.includes(name)) continue;
    check(!parameters.has(name), "invalid_request", `The parameter ${name} is repeated.`);
    parameters.set(name, value);
  }
  // RFC 6749 §3.2: "Parameters sent without a value MUST be treated as if they were omitted". Only
  // now, because a parameter without a value must not be repeated either.
  for (const [name, value] of parameters) if (value === "") parameters.delete(name);
  return { parameters, resources };
}

/** The text before and after the first separator. */
function splitOnce(text: string, separator: string): [string, string] {
  const [first = "", ...rest] = text.split(separator);
  return [first, rest.join(separator)];
}

/** RFC 6749 Appendix B. Returns undefined for malformed percent-encoding, and for a NUL. */
function formDecode(text: string): string | undefined {
  try {
    const isEncoded = /[%+]/.test(text);
    const decoded = isEncoded ? decodeURIComponent(text.replaceAll("+", " ")) : text;
    return decoded.includes("\0") ? undefined : decoded;
  } catch {
    return undefined;
  }
}

/** `raw` is the secret as it stood in Basic, where that must have been form-encoded. */
type Credentials =
  | { kind: "none" | "malformed"; client_id: string; reason: string }
  | { kind: "secret"; client_id: string; secret: string; raw: string }
  | { kind: "assertion"; client_id: string; assertion: string };

/** What a request authenticates its client with: one method alone (RFC 6749 §2.3). */
function presentedCredentials(authorization: string | null, form: Form["parameters"]): Credentials {
  const secret = form.get("client_secret");
  // Half of an assertion is an attempt to use one.
  const isAssertion = form.has("client_assertion") || form.has("client_assertion_type");
  const ways = countFields(authorization) + Number(secret !== undefined) + Number(isAssertion);
  check(ways <= 1, "invalid_request", "The request authenticates in more than one way.");
  const client_id = form.get("client_id") ?? "";
  if (ways === 0) return { kind: "none", client_id, reason: "The request has no credentials." };
  if (secret !== undefined) return { kind: "secret", client_id, secret, raw: secret };
  const credentials = isAssertion
    ? assertionCredentials(form)
    : basicCredentials(authorization ?? "");
  const isSame = credentials.kind === "malformed" || credentials.client_id === client_id;
  check(isSame || client_id === "", "invalid_request", "client_id and credentials differ.");
  return credentials;
}

/** Two Authorization fields arrive as one, joined by a comma: each starts with its scheme. */
function countFields(authorization: string | null): number {
  const withoutQuotedText = authorization?.replace(/"[^"]*"/g, "");
  return withoutQuotedText?.split(/, *(?=[^\s=,"]+(?: |$))/).length ?? 0;
}

const malformed = (reason: string) => ({ kind: "malformed", client_id: "", reason }) as const;

/** RFC 6749 §2.3.1: id and secret are form-encoded within the credentials of RFC 7617 §2. */
function basicCredentials(authorization: string): Credentials {
  const [, encoded] = /^Basic +(\S+)$/i.exec(authorization) ?? [];
  if (!encoded) return malformed("The Authorization field has no Basic credentials.");
  try {
    const pair = utf8.decode(Uint8Array.fromBase64(encoded));
    const [id, raw] = splitOnce(pair, ":");
    const client_id = formDecode(id);
    if (client_id === undefined || !pair.includes(":")) return malformed("Basic is malformed.");
    return { kind: "secret", client_id, secret: formDecode(raw) ?? "", raw };
  } catch {
    return malformed("The Basic credentials are not base64 of UTF-8.");
  }
}

/** RFC 7523 §2.2: whom an assertion names, before it is verified. */
function assertionCredentials(form: Form["parameters"]): Credentials {
  if (form.get("client_assertion_type") !== jwtBearer)
    return malformed(`The client_assertion_type is not ${jwtBearer}.`);
  const assertion = form.get("client_assertion") ?? "";
  try {
    return { kind: "assertion", client_id: String(jose.decodeJwt(assertion).sub), assertion };
  } catch {
    return malformed("The client_assertion is no JWT.");
  }
}

// --- Client authentication -----------------------------------------------------------------------

/** Resolves with the client if the credentials prove that it is the one. */
async function authenticate(server: Server, client: Client | undefined, credentials: Credentials) {
  switch (credentials.kind) {
    case "secret":
      return verifySecret(server.settings, client, credentials);
    case "assertion":
      check(client, "invalid_client", "The client is unknown.");
      await verifyAssertion(server, client, credentials.assertion);
      return client;
    default:
      throw new TokenRefusal("invalid_client", credentials.reason);
  }
}

/** For unknown clients: as long as a SHA-256 in base64, and equal to none. */
const dummySecrets: { sha256: string; expires_at?: number }[] = [{ sha256: " ".repeat(44) }];

function verifySecret(
  { issuer, clock }: Settings,
  client: Client | undefined,
  { secret, raw }: { secret: string; raw: string },
): Client {
  // RFC 6749 §2.3.1: "the authorization server MUST protect any endpoint utilizing it against brute
  // force attacks". Choice: no throttle, for any throttle locks somebody out. With a public issuer
  // no weak secret is in use instead, so that nobody can guess one.
  const { length } = secret || raw;
  const isLong = length >= minSecretCharacters || config.isLoopback(new URL(issuer));
  check(isLong, "invalid_client", `The secret has fewer than ${minSecretCharacters} characters.`);
  const now = config.secondsAt(clock);
  const match = matchSecret(client, secret, now);
  check(client, "invalid_client", "The client is unknown.");
  if (match === "right") return client;
  const isUnencoded = raw !== secret && matchSecret(client, raw, now) === "right";
  const unencoded = "The secret is right, but not form-encoded in Basic (RFC 6749 §2.3.1).";
  throw new TokenRefusal("invalid_client", isUnencoded ? unencoded : `The secret is ${match}.`);
}

/** Compares by SHA-256 in constant time, and does so for unknown clients too. */
function matchSecret(client: Client | undefined, secret: string, now: number) {
  const presented = Buffer.from(config.sha256(secret, "base64"));
  const registered = client?.client_secrets?.length ? client.client_secrets : dummySecrets;
  const equal = registered.filter(({ sha256 }) => timingSafeEqual(Buffer.from(sha256), presented));
  if (equal.length === 0) return "wrong";
  return equal.some(({ expires_at = Infinity }) => expires_at > now) ? "right" : "expired";
}

/** private_key_jwt: RFC 7523 §3, stricter where rfc7523bis is. */
async function verifyAssertion(server: Server, client: Client, assertion: string): Promise<void> {
  const { client_id, publicKeys, token_endpoint_auth_signing_alg: alg } = client;
  check(publicKeys, "invalid_client", "The client has no keys registered.");
  const { acceptedAlgorithms, clock } = server.settings;
  const verifying = jose.jwtVerify(assertion, publicKeys.find, {
    algorithms: alg ? [alg] : acceptedAlgorithms,
    issuer: client_id,
    subject: client_id,
    requiredClaims: ["exp"],
    clockTolerance: config.leewaySeconds,
    currentDate: new Date(clock()),
  });
  const { payload, protectedHeader } = await verifying.catch(
    refuseAs("invalid_client", "The assertion"),
  );
  const isNamed = protectedHeader.kid || publicKeys.count() === 1;
  check(isNamed, "invalid_client", "The assertion does not say which of several keys it is by.");
  checkAssertion(server.settings, payload, protectedHeader);
  const { exp = 0, jti } = payload;
  check(config.isText(jti), "invalid_client", "The assertion has no jti.");
  const use = server.keyStore.useOnce(["assertion", client_id, jti], exp + config.leewaySeconds);
  check(await use, "invalid_client", "The assertion was used before.");
}

/** What RFC 7523 §3 wants of an assertion and jose does not check. */
function checkAssertion(
  { issuer, clock }: Settings,
  { aud, exp = 0, iat = 0 }: jose.JWTPayload,
  { crit, typ = "JWT" }: jose.JWTHeaderParameters,
): void {
  // RFC 7515 §4.1.11: no extension is known here. jose would accept b64.
  check(!crit, "invalid_client", "The assertion has a crit header.");
  // RFC 8725 §3.11: a JWT of another kind is no assertion.
  const kinds = /^(application\/)?(jwt|client-authentication\+jwt)$/i;
  const isAssertion = config.isText(typ) && kinds.test(typ);
  check(isAssertion, "invalid_client", `The assertion has typ ${JSON.stringify(typ)}.`);
  // Choice: stricter than RFC 7523 §3. The URL of the token endpoint would let another server that
  // names it as its own use the assertion here.
  const isForUs = aud === issuer || Bun.deepEquals(aud, [issuer]);
  const reason = `The aud of the assertion is ${JSON.stringify(aud)}, not ${issuer} alone.`;
  check(isForUs, "invalid_client", reason);
  const latest = config.secondsAt(clock) + config.leewaySeconds;
  const isShort = exp <= latest + assertionMaxSeconds;
  check(isShort, "invalid_client", `The assertion lives for over ${assertionMaxSeconds} s.`);
  check(iat <= latest, "invalid_client", "The assertion was issued in the future.");
}

// --- Proof of possession -------------------------------------------------------------------------

/** The thumbprint of the key that the token will be bound to, if it will be bound (RFC 9449 §5). */
async function boundKey(server: Server, client: Client, proof: string | null) {
  if (proof !== null) return await verifyProof(server, proof);
  const isFree = !client.dpop_bound_access_tokens;
  check(isFree, "invalid_dpop_proof", "The client must send a DPoP proof, and sent none.");
  return undefined;
}

/**
 * RFC 9449 §4.3: the thumbprint of the key that a proof shows the client to have. The API checks
 * proofs with code of its own, for the two share nothing but HTTP.
 */
async function verifyProof({ settings, tokenEndpoint, keyStore }: Server, proof: string) {
  const code = "invalid_dpop_proof";
  const verifying = jose.jwtVerify(proof, jose.EmbeddedJWK, {
    typ: "dpop+jwt",
    algorithms: settings.acceptedAlgorithms,
    maxTokenAge: config.proofMaxAgeSeconds - config.leewaySeconds, // jose adds the leeway to it
    clockTolerance: config.leewaySeconds,
    currentDate: new Date(settings.clock()),
  });
  const { payload, protectedHeader } = await verifying.catch(refuseAs(code, "The DPoP proof"));
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, iat = 0, jti } = payload;
  check(!crit, code, "The DPoP proof has a crit header.");
  // §4.3 (7). jose lets an RSA key with p and q pass.
  const isPublic = !config.privateMembers.some((member) => member in jwk);
  check(isPublic, code, "The DPoP proof shows a private key.");
  // §4.3 (9): without query and fragment, normalized by `new URL`.
  const [target] = URL.parse(config.isText(htu) ? htu : "")?.href.split(/[?#]/) ?? [];
  const reason = `The DPoP proof is for ${JSON.stringify([htm, htu])}, this is POST ${tokenEndpoint}.`;
  check(htm === "POST" && target === tokenEndpoint, code, reason);
  check(config.isText(jti), code, "The DPoP proof has no jti.");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  const expires_at = iat + config.proofMaxAgeSeconds;
  const use = keyStore.useOnce(["dpop", jkt, tokenEndpoint, jti], expires_at);
  check(await use, code, "The DPoP proof was used before.");
  return jkt;
}

// --- Documents and routes ------------------------------------------------------------------------

/** RFC 8414 §2, made from the settings: what is advertised is what is done. */
function metadata(
  { issuer, scopes, acceptedAlgorithms }: Settings,
  token_endpoint: string,
): object {
  return {
    issuer,
    jwks_uri: `${config.metadataUrl(issuer)}/jwks`,
    token_endpoint,
    scopes_supported: scopes.map(({ scope }) => scope),
    response_types_supported: [], // Choice: §2 requires it, though §3.2 would omit an empty one
    grant_types_supported: ["client_credentials"],
    token_endpoint_auth_methods_supported: [
      ...["client_secret_basic", "client_secret_post", "private_key_jwt"],
    ],
    token_endpoint_auth_signing_alg_values_supported: acceptedAlgorithms,
    dpop_signing_alg_values_supported: acceptedAlgorithms,
    protected_resources: [...new Set(scopes.map(({ resource }) => resource))], // RFC 9728 §4
  };
}

/** Whether this instance should get requests. */
function health({ keyStore, lifecycle, settings }: Server): Response {
  const isReady = !lifecycle.isStopping && keyStore.signingKey(config.secondsAt(settings.clock));
  const whenReady = keyStore.isHealthy ? "ok" : "degraded";
  const init = { status: isReady ? 200 : 503, headers: config.noStore };
  return Response.json({ status: isReady ? whenReady : "unavailable" }, init);
}

/** What the server answers, all of it below the path of the issuer. */
function routes(server: Server): Map<string, config.Handler> {
  const { issuer, clock, signingKeys } = server.settings;
  const init = { headers: { "cache-control": `public, max-age=${signingKeys.maxAgeSeconds}` } };
  const path = (url: string) => new URL(url).pathname;
  const document = () => Response.json(metadata(server.settings, server.tokenEndpoint), init);
  const jwks = () =>
    Response.json({ keys: server.keyStore.publicKeys(config.secondsAt(clock)) }, init);
  return new Map<string, config.Handler>([
    [`GET ${path(config.metadataUrl(issuer))}`, document],
    [`GET ${path(config.wellKnownUrl(issuer, "oauth-authorization-server"))}`, document],
    [`GET ${path(`${config.metadataUrl(issuer)}/jwks`)}`, jwks],
    [`GET ${path(`${issuer}/health`)}`, () => health(server)],
    [
      `POST ${path(server.tokenEndpoint)}`,
      async (request, http) => await token(server, request, http.requestIP(request)?.address),
    ],
  ]);
}

// --- Key store -----------------------------------------------------------------------------------

const numberColumns = ["generation", "signs_from", "signs_until", "removed_at"] as const;

/** A row of the table: a private JWK, in clear or sealed, and the dates that it was made with. */
type Row = Record<"alg" | "kid" | "jwk", string> & Record<(typeof numberColumns)[number], number>;
type UsedRow = { id: string; expires_at: number };
type SigningKey = Row & { privateKey: jose.CryptoKey; publicJwk: jose.JWK };

const tables = `
  CREATE TABLE IF NOT EXISTS signing_keys (
    alg TEXT, generation BIGINT, kid TEXT NOT NULL, jwk TEXT NOT NULL, signs_from BIGINT NOT NULL,
    signs_until BIGINT NOT NULL, removed_at BIGINT NOT NULL, PRIMARY KEY (alg, generation));
  CREATE TABLE IF NOT EXISTS used_jtis (id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL);
  CREATE INDEX IF NOT EXISTS used_jtis_expires_at ON used_jtis (expires_at)`;
// What instances that start at one instant do to each other; in PostgreSQL a unique violation, a
// duplicate table or a duplicate object.
const collisions = ["SQLITE_BUSY", "23505", "42P07", "42710"];
/** Rows are deleted this late, so that instances whose clocks differ forget nothing early. */
const sweepDelaySeconds = 900;

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
  #keys: SigningKey[] = [];
  #polledAt: number;
  #timer: Timer | undefined;
  #waitingUses: { row: UsedRow; settled: PromiseWithResolvers<boolean> }[] = [];
  #isInserting = false;

  constructor(settings: Settings, log: config.Log) {
    this.#settings = settings;
    this.#log = log;
    this.#sealing = new Sealing(settings.keyEncryptionSecret);
    this.#sqliteFile = /^sqlite:(?:\/\/)?([^?]+)/.exec(settings.databaseUrl)?.[1];
    this.#polledAt = config.secondsAt(settings.clock);
    if (this.#sqliteFile && this.#sqliteFile !== ":memory:") {
      mkdirSync(dirname(this.#sqliteFile), { recursive: true, mode: 0o700 });
      closeSync(openSync(this.#sqliteFile, "a", 0o600)); // SQLite gives -wal and -shm this mode
    }
    this.#sql = this.#connect();
  }

  #connect(): Bun.SQL {
    // PgBouncer gives each transaction another connection, where a named statement is unknown.
    const options = this.#sqliteFile ? {} : { prepare: false };
    return new Bun.SQL(this.#settings.databaseUrl, options);
  }

  /** The key that signs: the one whose period holds, else the one whose period comes next. */
  signingKey(at: number): SigningKey | undefined {
    const [alg] = this.#settings.signingKeys.algorithms;
    return this.#keys.find((key) => key.alg === alg && key.signs_until > at);
  }

  /** The public members of every key until it is removed, also of an algorithm used no longer. */
  publicKeys(at: number): jose.JWK[] {
    return this.#keys.filter(({ removed_at }) => removed_at > at).map(({ publicJwk }) => publicJwk);
  }

  /** Opens the database, and makes what is missing in it. Rejects if it cannot be used. */
  async open(): Promise<void> {
    const started = performance.now();
    let hasSaidSo = false;
    while (true) {
      try {
        await this.#prepare();
        await this.#refresh();
        break;
      } catch (error) {
        const waitSeconds = this.#waitSecondsAfter(error);
        if (performance.now() - started > waitSeconds * 1000) throw this.#startError(error);
        if (!hasSaidSo && waitSeconds > 5) console.error(`Waiting for ${this.#place} …`);
        hasSaidSo ||= waitSeconds > 5;
        await Bun.sleep(50);
      }
    }
    const { pollSeconds } = this.#settings.signingKeys;
    this.#timer = setInterval(() => void this.#poll(), pollSeconds * 1000);
  }

  /** How long a start goes on after such an error. */
  #waitSecondsAfter(error: unknown): number {
    const { code, errno } = error as Bun.SQL.PostgresError;
    if (collisions.includes(code) || collisions.includes(String(errno))) return 5;
    if (this.#sqliteFile || error instanceof UnusableKey) return 0;
    // PostgreSQL that answers has a code of its own in errno: 57P03 while it starts itself.
    return !errno || String(errno) === "57P03" ? this.#settings.databaseWaitSeconds : 0;
  }

  /** Where the database is, without the password. */
  get #place(): string {
    if (this.#sqliteFile) return `the database ${this.#sqliteFile}`;
    const { hostname, port } = new URL(this.#settings.databaseUrl);
    return `PostgreSQL at ${hostname}:${port || 5432}`;
  }

  #startError(error: unknown): unknown {
    if (error instanceof UnusableKey) return error;
    const remedy = this.#sqliteFile
      ? "Check the file, or move it away: without it, new keys are made."
      : "Check that it runs, and DATABASE_URL.";
    return new Error(`Cannot use ${this.#place}: ${config.reasonOf(error)}. ${remedy}`);
  }

  async #prepare(): Promise<void> {
    if (this.#sqliteFile) {
      // It runs on the event loop, so it must not wait for long. What is deleted is overwritten.
      await this.#sql.unsafe("PRAGMA busy_timeout = 100; PRAGMA secure_delete = ON");
      await this.#sql.unsafe("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL");
    }
    // Tables that are there are left alone, so that a role without CREATE can run the server.
    const probe = inTime(this.#sql`SELECT 1 FROM signing_keys, used_jtis LIMIT 1`);
    await probe.catch(() => inTime(this.#sql.unsafe(tables)));
  }

  async #poll(): Promise<void> {
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
    await this.#sql.close({ timeout: 1 }).catch(() => {});
  }

  // --- Life of a key -----------------------------------------------------------------------------

  /**
   * Reads the table, makes each key that is missing, and deletes what is long over. A database that
   * can be read but not written is enough, as long as there is a key to sign with.
   */
  async #refresh(): Promise<void> {
    const at = config.secondsAt(this.#settings.clock);
    let rows = await this.#load();
    if (!this.#timer) this.#requireUsableKeys(rows, at);
    try {
      for (const alg of this.#settings.signingKeys.algorithms) {
        let from = this.#missingFrom(alg, at);
        while (from !== undefined) {
          await this.#insertKey(alg, nextGeneration(rows, alg), from);
          rows = await this.#load();
          from = this.#missingFrom(alg, at);
        }
      }
      await this.#sweep(at);
      if (!this.isHealthy) this.#log.write("database back", {});
      this.isHealthy = true;
    } catch (error) {
      if (!this.signingKey(at) || this.#waitSecondsAfter(error) === 5) throw error;
      this.#reportAway(error);
    }
  }

  /** At the start, a key in use that cannot be opened is fatal; later it is logged and skipped. */
  #requireUsableKeys(rows: Row[], at: number): void {
    for (const alg of this.#settings.signingKeys.algorithms) {
      const inUse = rows.find((row) => row.alg === alg && row.signs_until > at);
      const isOpen = (key: Row) => key.alg === alg && key.generation === inUse?.generation;
      if (inUse && !this.#keys.some(isOpen)) throw new UnusableKey(inUse.kid);
    }
  }

  /** Reads all rows, and takes over the keys that can be opened. */
  async #load(): Promise<Row[]> {
    const rows: Row[] = await inTime(this.#sql`SELECT * FROM signing_keys`);
    // PostgreSQL gives BIGINT as text.
    for (const row of rows) for (const name of numberColumns) row[name] = Number(row[name]);
    rows.sort((a, b) => a.signs_from - b.signs_from || a.generation - b.generation);
    const before = this.#keys;
    const opened = await Promise.all(rows.map(async (row) => await this.#open(row)));
    this.#keys = opened.filter((key) => key !== undefined);
    const kids = this.#keys.map(({ kid }) => kid);
    for (const { kid, alg } of before)
      if (!kids.includes(kid)) this.#log.write("key removed", { kid, alg });
    return rows;
  }

  async #open(row: Row): Promise<SigningKey | undefined> {
    const known = this.#keys.find(({ jwk }) => jwk === row.jwk);
    const isSame = known && Bun.deepEquals({ ...known, ...row }, known);
    if (isSame && !this.#sealing.mustSeal(row)) return known;
    try {
      const key = await this.#sealing.open(row);
      if (this.#sealing.mustSeal(row)) await this.#sealRow(row);
      return key;
    } catch (error) {
      this.#log.write("key skipped", { kid: row.kid, reason: config.reasonOf(error) });
      return undefined;
    }
  }

  /** Seals a key that was read in clear, so that `none` can leave the list of secrets. */
  async #sealRow(row: Row): Promise<void> {
    const sealed = await this.#sealing.seal(row);
    await inTime(this.#sql`UPDATE signing_keys SET jwk = ${sealed}
      WHERE alg = ${row.alg} AND generation = ${row.generation} AND jwk = ${row.jwk}`);
    await this.#clearJournal();
  }

  /**
   * From when on a key is missing: for every algorithm one must sign, and its successor must be
   * public all that time, so that every API has it before it signs.
   */
  #missingFrom(alg: string, at: number): number | undefined {
    const [signing, ...later] = this.#keys.filter((key) => key.alg === alg && key.signs_until > at);
    if (!signing) return at;
    const isFollowed = later.some(({ signs_from }) => signs_from >= signing.signs_until);
    return isFollowed ? undefined : signing.signs_until;
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
    await this.#clearJournal();
  }

  /** No private key stays in SQLite's journal. */
  async #clearJournal(): Promise<void> {
    if (this.#sqliteFile) await this.#sql.unsafe("PRAGMA wal_checkpoint(TRUNCATE)");
  }

  /**
   * Deletes what expired, late, and writes a row of its own to see that writing works. A key is
   * deleted only if it expired between two polls: an instance whose clock is far ahead, or jumps,
   * has not seen the keys of the others expire.
   */
  async #sweep(at: number): Promise<void> {
    const since = this.#polledAt - sweepDelaySeconds;
    const until = at - sweepDelaySeconds;
    const hasJumped = at - this.#polledAt > sweepDelaySeconds;
    this.#polledAt = at;
    if (!hasJumped)
      await inTime(this.#sql`DELETE FROM signing_keys
        WHERE removed_at > ${since} AND removed_at <= ${until}`);
    await inTime(this.#sql`DELETE FROM used_jtis WHERE expires_at < ${until}`);
    const row = { id: "last poll", expires_at: at };
    await inTime(this.#sql`INSERT INTO used_jtis ${this.#sql(row)}
      ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at`);
  }

  // --- Used identifiers --------------------------------------------------------------------------

  /**
   * Uses up what identifies a JWT until it is accepted no longer. Resolves with whether it was new,
   * to exactly one caller among all instances. Rejects with a refusal if the database is away.
   */
  async useOnce(identifier: string[], expires_at: number): Promise<boolean> {
    const id = config.sha256(JSON.stringify(identifier), "base64url");
    const settled = Promise.withResolvers<boolean>();
    this.#waitingUses.push({ row: { id, expires_at: Math.ceil(expires_at) }, settled });
    if (!this.#isInserting) void this.#insertWaiting();
    return await inTime(settled.promise).catch((error) => {
      this.#reportAway(error);
      throw new TokenRefusal("temporarily_unavailable", config.reasonOf(error));
    });
  }

  /** Inserts together all that arrive while an insert is under way: one round trip for many. */
  async #insertWaiting(): Promise<void> {
    this.#isInserting = true;
    while (this.#waitingUses.length > 0) {
      const uses = this.#waitingUses.splice(0, 500); // an engine bounds a statement's parameters
      // All instances insert in one order, so that no two wait for each other.
      const rows = uses.map(({ row }) => row).sort((a, b) => (a.id < b.id ? -1 : 1));
      try {
        const insert = this.#sql`INSERT INTO used_jtis ${this.#sql(rows)}
          ON CONFLICT (id) DO NOTHING RETURNING id`;
        const inserted: UsedRow[] = await inTime(insert);
        const isNew = new Set(inserted.map(({ id }) => id));
        // Of several with one id in this batch the first is the new one.
        for (const { row, settled } of uses) settled.resolve(isNew.delete(row.id));
      } catch (error) {
        for (const { settled } of uses) settled.reject(error);
      }
    }
    this.#isInserting = false;
  }
}

/** A key that must sign now, but cannot be opened. */
class UnusableKey extends Error {
  constructor(kid: string) {
    const remedy = "Add the secret that sealed it to KEY_ENCRYPTION_SECRET, or delete its row.";
    super(`The signing key ${kid} cannot be opened. ${remedy}`);
  }
}

/** Counts all rows, also those that cannot be opened: their number is taken. */
function nextGeneration(rows: Row[], alg: string): number {
  return Math.max(0, ...rows.filter((row) => row.alg === alg).map((row) => row.generation)) + 1;
}

/** Bun.SQL waits for ever for an answer, but a database that is frozen must not hold a request. */
async function inTime<T>(query: Promise<T>): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timeout = setTimeout(reject, 2_000, new Error("The database did not answer within 2 s."));
  return await Promise.race([query, late]).finally(() => clearTimeout(timeout));
}

/** How private keys rest: in clear, or as JWE under the secrets of KEY_ENCRYPTION_SECRET. */
class Sealing {
  readonly #secrets: Uint8Array[];
  readonly #readsClear: boolean;

  constructor(setting: string) {
    const words = setting.split(",").filter(config.isText);
    const secrets = words.filter((word) => word !== "none");
    this.#secrets = secrets.map((word) => Buffer.from(word, "base64url"));
    this.#readsClear = secrets.length === 0 || words.includes("none");
    const areLong = this.#secrets.every(({ length }) => length === 32);
    requireAll("", [[areLong, "KEY_ENCRYPTION_SECRET must be 32 bytes in base64url"]]);
  }

  /** Whether a row rests in clear, although there is a secret to seal it with. */
  mustSeal({ jwk }: Row): boolean {
    return jwk.startsWith("{") && this.#secrets.length > 0;
  }

  /** The JWK of a row, sealed with the first secret if there is one. */
  async seal(row: Row): Promise<string> {
    const [secret] = this.#secrets;
    if (!secret) return row.jwk;
    const jwe = new jose.CompactEncrypt(Buffer.from(row.jwk));
    return await jwe.setProtectedHeader(sealedHeader(row)).encrypt(secret);
  }

  /** The key of a row. Rejects for one that cannot be opened, or whose kid or dates were changed. */
  async open(row: Row): Promise<SigningKey> {
    const jwk: jose.JWK = JSON.parse(await this.#unseal(row));
    const kid = await jose.calculateJwkThumbprint(jwk);
    if (kid !== row.kid) throw new Error("The kid is not the thumbprint of the key.");
    const isInOrder = row.signs_from < row.signs_until && row.signs_until <= row.removed_at;
    if (!isInOrder) throw new Error("The dates of the key are out of order.");
    const { kty, crv, x, y, n, e, pub } = jwk;
    const members = { kty, crv, x, y, n, e, pub, kid, alg: row.alg, use: "sig" };
    const publicJwk = JSON.parse(JSON.stringify(members)); // without those that the key has not
    const privateKey = (await jose.importJWK(jwk, row.alg)) as jose.CryptoKey;
    return { ...row, publicJwk, privateKey };
  }

  async #unseal(row: Row): Promise<string> {
    if (row.jwk.startsWith("{")) {
      if (this.#readsClear) return row.jwk;
      throw new Error(
        "The key is in clear, and KEY_ENCRYPTION_SECRET does not have the word none.",
      );
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

function sealedHeader({ alg: key_alg, kid, signs_from, signs_until, removed_at }: Row) {
  return { alg: "dir", enc: "A256GCM", kid, key_alg, signs_from, signs_until, removed_at };
}

// --- Checking the settings -----------------------------------------------------------------------

const reservedClaims = [
  ...["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"],
];

/** A rule of the settings, and whether it holds. */
type Rule = [holds: unknown, rule: string];

/** Throws an Error that names the field for the first rule that does not hold. */
function requireAll(field: string, rules: Rule[]): void {
  for (const [holds, rule] of rules) if (!holds) throw new Error(`config.ts: ${field}${rule}.`);
}

function checkSettings(settings: Settings): void {
  const { databaseUrl, acceptedAlgorithms, signingKeys, scopes } = settings;
  const { algorithms, rotationSeconds, retentionSeconds } = signingKeys;
  const { pollSeconds, maxAgeSeconds, refreshSeconds, coolDownSeconds } = signingKeys;
  const delays = [pollSeconds, maxAgeSeconds, refreshSeconds, coolDownSeconds];
  // A successor must have reached every cache before it signs; twice, for a margin.
  const caches = 2 * delays.reduce((sum, seconds) => sum + seconds);
  const isPositive = [...delays, retentionSeconds].every((seconds) => seconds > 0);
  const areAccepted = algorithms.every((alg) => acceptedAlgorithms.includes(alg));
  requireAll("", [
    [/^(sqlite|postgres(ql)?):./.test(databaseUrl), "DATABASE_URL must be sqlite: or postgres:"],
    [isPositive, "signingKeys: each time must be over 0"],
    [rotationSeconds > caches, `signingKeys.rotationSeconds must be over ${caches}`],
    [areAccepted, "signingKeys.algorithms must be some of acceptedAlgorithms"],
    [algorithms.length > 0, "signingKeys.algorithms must not be empty"],
  ]);
  for (const { scope, resource } of scopes) {
    const isUri = URL.canParse(resource) && !resource.includes("#"); // RFC 8707 §2
    const isAlone = scopes.filter((other) => other.scope === scope).length === 1;
    requireAll(`scopes: ${scope}: `, [[isUri && isAlone, "needs one resource, which is a URI"]]);
  }
  for (const client of settings.clients) checkClient(client, settings);
}

function checkClient(client: config.ClientRegistration, settings: Settings): void {
  const { client_id, client_secrets = [], jwks, jwks_uri, claims = {} } = client;
  const { token_endpoint_auth_signing_alg: alg, access_token_lifetime_seconds: lifetime } = client;
  const field = `clients: ${client_id}: `;
  const isAlone = settings.clients.filter((other) => other.client_id === client_id).length === 1;
  const scopes = settings.scopes.map(({ scope }) => scope);
  const isPrivate = (jwk: jose.JWK) => config.privateMembers.some((name) => name in jwk);
  const isAccepted = !alg || settings.acceptedAlgorithms.includes(alg);
  const { retentionSeconds } = settings.signingKeys;
  const isLifetime = Number.isInteger(lifetime) && lifetime > 0 && lifetime <= retentionSeconds;
  requireAll(field, [
    [client_id && isAlone, "client_id is empty or there twice"],
    [client.scope.split(" ").every((name) => scopes.includes(name)), "scope is not in scopes"],
    [!reservedClaims.some((name) => name in claims), "claims has a reserved name"],
    [client_secrets[0] || jwks?.keys[0] || jwks_uri, "needs client_secrets, jwks or jwks_uri"],
    [!jwks || !jwks_uri, "must not have both jwks and jwks_uri"], // RFC 7591 §2
    [!jwks?.keys.some(isPrivate), "jwks has a private key"],
    [isAccepted, "token_endpoint_auth_signing_alg is not in acceptedAlgorithms"],
    [isLifetime, "access_token_lifetime_seconds must be 1 to signingKeys.retentionSeconds"],
  ]);
  if (jwks_uri) config.parseServerUrl(`config.ts: ${field}jwks_uri`, jwks_uri.split("?")[0] ?? "");
  for (const { sha256, expires_at = 0 } of client_secrets)
    requireAll(`${field}client_secrets: `, [
      [/^[A-Za-z0-9+/]{43}=$/.test(sha256), "sha256 must be a SHA-256 in base64"],
      // As milliseconds this would be in 1973.
      [expires_at < 100_000_000_000, "expires_at must be in seconds since 1970"],
    ]);
}

function readyClient(client: config.ClientRegistration, settings: Settings): Client {
  const { scopes, signingKeys, tls, clock } = settings;
  const { scope, jwks, jwks_uri } = client;
  const resources = new Map(scopes.map((entry) => [entry.scope, entry.resource]));
  const scopesAt = Map.groupBy(scope.split(" "), (name) => resources.get(name) ?? "");
  if (jwks?.keys.length) {
    const publicKeys = { find: jose.createLocalJWKSet(jwks), count: () => jwks.keys.length };
    return { ...client, scopesAt, publicKeys };
  }
  if (!jwks_uri) return { ...client, scopesAt };
  const { refreshSeconds: maxAgeSeconds, coolDownSeconds } = signingKeys;
  const rules = { maxAgeSeconds, coolDownSeconds, keepSeconds: 86_400 };
  const fetchKeys = async (signal: AbortSignal) =>
    (await config.fetchJson(jwks_uri, signal, tls))["keys"];
  const remote = new config.RemoteKeys(fetchKeys, rules, clock);
  return {
    ...client,
    scopesAt,
    publicKeys: { find: remote.find, count: () => remote.keys.length },
  };
}

// --- Start ---------------------------------------------------------------------------------------

/**
 * Starts the server. Rejects with an Error for a mistake in the settings and a database out of
 * reach. An `issuer` with port 0 takes a free port.
 */
export async function start(settings = config.authorizationServer): Promise<config.RunningServer> {
  const ownUrl = config.parseOwnUrl("ISSUER", settings.issuer);
  const listening = config.listenOptions("ISSUER", ownUrl, settings);
  checkSettings(settings);
  const clients = new Map(settings.clients.map((c) => [c.client_id, readyClient(c, settings)]));
  const log = new config.Log(settings.log);
  const lifecycle = new config.Lifecycle(log);
  const keyStore = new KeyStore(settings, log);
  await keyStore.open();
  const http = Bun.serve({
    ...listening,
    development: false,
    maxRequestBodySize: 16_384,
    fetch: (request, http) => lifecycle.answer(answer, request, http),
  });
  const issuer = config.urlOf(settings.issuer, http);
  const tokenEndpoint = `${issuer}/connect/token`;
  const own = { ...settings, issuer };
  const server = { settings: own, tokenEndpoint, clients, keyStore, lifecycle, log };
  const answer = config.router(issuer, routes(server));
  const stop = async () => {
    await lifecycle.stop(http, settings.drainSeconds);
    await keyStore.close();
  };
  return { url: issuer, server: http, stop };
}

if (import.meta.main) {
  config.requireBunVersion();
  if (process.argv.includes("--new-secret")) {
    const secret = randomBytes(32).toString("base64url");
    console.log(`secret: ${secret}\nsha256: ${config.sha256(secret, "base64")}`);
  } else {
    const running = await start().catch(config.fail);
    config.stopOnSignal(running);
    console.error(`authorization server: ${running.url}`);
  }
}
