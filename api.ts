/**
 * The resource server (RFC 6749 §1.1): an API that answers only callers whose access token is
 * genuine, meant for it, and carries the scope.
 *
 *   GET /identity                              the caller's claims; needs scope api1
 *   GET /.well-known/oauth-protected-resource  metadata, RFC 9728
 *   GET /health
 *
 * Tokens are JWTs (RFC 9068), sent as Bearer (RFC 6750) or bound to a key of the caller (RFC 9449).
 * It asks nobody about a token: one counts until it expires or the key that signed it is gone.
 * A copier keeps `authorize`. Run: bun run api.ts
 */

import * as jose from "jose";
import { boundedFetch, fail, lifecycle, listenOptions, log } from "./config.ts";
import { requireOrigin, resourceServer, stopOnSignal } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

const { issuer, resource, acceptedAlgorithms, refreshSeconds, coolDownSeconds } = resourceServer;
/** RFC 9728 §5.1, RFC 6750 §3, RFC 9449 §7.1. */
const where = `resource_metadata="${resource}/.well-known/oauth-protected-resource"`;
const challenges = `Bearer ${where}, DPoP algs="${acceptedAlgorithms.join(" ")}", ${where}`;
const leewaySeconds = 30;
const proofMaxAgeSeconds = 90;
const maxBytes = 1_048_576;
const proofRules = { typ: "dpop+jwt", algorithms: acceptedAlgorithms };
const privateMembers = "d p q dp dq qi oth k priv".split(" ");
const json = new Headers({ "cache-control": "no-store", "content-type": "application/json" });
const secondsNow = () => Math.floor(Date.now() / 1000);
const isText = (value: unknown) => typeof value === "string" && value !== "";

/** The claims of an access token (RFC 9068 §2.2) that is valid here. */
export type Claims = jose.JWTPayload & { client_id: string; exp: number; cnf?: { jkt?: string } };

// --- Errors --------------------------------------------------------------------------------------

/** RFC 6750 §3.1, RFC 9449 §7.1: each code with its status and a constant text. */
const errors = {
  no_credentials: [401, "An access token is needed."], // a code for the log alone (§3.1)
  invalid_request: [400, "The Authorization field is malformed."],
  invalid_token: [401, "The access token is not valid here. The log of the API has the reason."],
  invalid_dpop_proof: [401, "The DPoP proof is missing or not valid."],
  insufficient_scope: [403, "The access token lacks the scope."],
  temporarily_unavailable: [503, "The token cannot be checked now. Try again soon."],
  server_error: [500, "Internal Server Error"],
} as const;

/** Why a caller is turned away; the reason and the details go to the log. */
export class Refusal extends Error {
  readonly code: keyof typeof errors;
  readonly details: { scope?: string; client_id?: string; jti?: unknown };

  constructor(code: keyof typeof errors, reason: string, details = {}) {
    super(reason);
    this.code = code;
    this.details = details;
  }
}

/** What a step finds wrong is an Error: this makes it a Refusal with the code of the step. */
const refuseAs = (code: keyof typeof errors) => (error: Error) => {
  throw error instanceof Refusal ? error : new Refusal(code, error.message);
};

// --- Authorization -------------------------------------------------------------------------------

/** Claims of valid tokens by the Authorization field they came in, oldest first. */
const remembered = new Map<string, Claims>();

/**
 * The caller's claims, without waiting if the token was seen before. Rejects with a Refusal for a
 * caller who may not use `scope` (RFC 6750 §3).
 */
export function authorize(request: Request, scope: string): Claims | Promise<Claims> {
  const field = request.headers.get("authorization") ?? "";
  const claims = remembered.get(field);
  // Without leeway: a token that is about to expire is validated again.
  const known = claims && claims.exp > secondsNow() ? claims : undefined;
  if (known && !known.cnf && hasScope(known, scope)) return known;
  return validateCall(request, scope, field, known);
}

async function validateCall(request: Request, scope: string, field: string, known?: Claims) {
  const { scheme, accessToken } = presentedToken(field);
  const before = keySet;
  const claims = known ?? (await validateToken(accessToken).catch(refuseAs("invalid_token")));
  const jkt = claims.cnf?.jkt;
  if (scheme !== (jkt ? "dpop" : "bearer")) throw new Refusal("invalid_token", "the other scheme");
  if (jkt) await verifyProof(request, accessToken, jkt).catch(refuseAs("invalid_dpop_proof"));
  // Not if the keys changed meanwhile: the token may be of one that is gone.
  if (keySet === before && field.length <= 4_096) remembered.set(field, claims);
  if (remembered.size > 1_000) remembered.delete(remembered.keys().next().value!);
  if (hasScope(claims, scope)) return claims;
  const { client_id, jti } = claims;
  throw new Refusal("insufficient_scope", "not in the token", { scope, client_id, jti });
}

/** RFC 6750 §2.1, RFC 9449 §7.1. */
function presentedToken(field: string) {
  const [, scheme, accessToken] = /^(Bearer|DPoP) +([\w.~+/-]+=*)$/i.exec(field) ?? [];
  if (scheme && accessToken) return { scheme: scheme.toLowerCase(), accessToken };
  // Two fields arrive as one, joined by a comma.
  const isOurs = /(^|, *)(Bearer|DPoP)( |$)/i.test(field);
  throw new Refusal(isOurs ? "invalid_request" : "no_credentials", "no well-formed access token");
}

/** RFC 9068 §4. Throws for a token that is not valid here. */
async function validateToken(accessToken: string): Promise<Claims> {
  const { payload, protectedHeader } = await jose.jwtVerify<Claims>(accessToken, issuerKey, {
    typ: "at+jwt", // or application/at+jwt
    algorithms: acceptedAlgorithms,
    issuer,
    audience: resource,
    requiredClaims: ["exp", "iat"],
    clockTolerance: leewaySeconds,
  });
  if (protectedHeader.crit) throw new Error("crit in the header");
  const { sub, client_id, jti, cnf } = payload;
  if (![sub, client_id, jti].every(isText)) throw new Error("no sub, client_id or jti");
  // Of the ways to bind a token (RFC 7800 §3) this server knows one.
  if ("cnf" in payload && !cnf?.jkt) throw new Error("bound in an unknown way");
  return payload;
}

/** Whether a scope, a string or from other issuers an array, has this one. */
function hasScope({ scope: granted }: Claims, scope: string): boolean {
  return (typeof granted === "string" ? granted.split(" ") : [granted].flat()).includes(scope);
}

// --- Proof of possession -------------------------------------------------------------------------

const usedProofs = new Set<string>();
const oldestProof = usedProofs.values(); // goes on where it was: to begin anew costs more and more

/** RFC 9449 §4.3 and §7.1. Throws for a proof that does not fit this request and token. */
async function verifyProof(request: Request, accessToken: string, boundTo: string): Promise<void> {
  const proof = request.headers.get("dpop") ?? "";
  const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK, proofRules);
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, iat = 0, jti, ath } = payload;
  if (crit) throw new Error("crit in the header");
  // jose lets an RSA key with p and q pass.
  if (privateMembers.some((member) => member in jwk)) throw new Error("private key in the header");
  // Both normalized, as far as `new URL` does it.
  const [target] = new URL(isText(htu) ? `${htu}` : "").href.split(/[?#]/);
  const { href } = new URL(resource + pathOf(request));
  if (htm !== request.method || target !== href) throw new Error("for another request");
  const age = secondsNow() - iat;
  if (age > proofMaxAgeSeconds || age < -leewaySeconds) throw new Error("iat too far from now");
  if (ath !== Bun.SHA256.hash(accessToken, "base64url")) throw new Error("ath of another token");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  if (jkt !== boundTo) throw new Error("not the key that the token is bound to");
  if (!isText(jti)) throw new Error("no jti");
  const used = Bun.SHA256.hash(JSON.stringify([jkt, href, jti]), "base64url");
  if (usedProofs.has(used)) throw new Error("jti used before");
  usedProofs.add(used);
  // Choice: the oldest is forgotten. To refuse instead would let one caller lock out the others.
  if (usedProofs.size > 50_000) usedProofs.delete(oldestProof.next().value!);
}

// --- Keys of the issuer --------------------------------------------------------------------------

let keys: jose.JWK[] = [];
let keySet: ReturnType<typeof jose.createLocalJWKSet> | undefined;
let fetching: Promise<void> | undefined;
let fetchedAt = -Infinity;

/** The key that a token names; for an unknown one the keys are fetched again. */
async function issuerKey(header: jose.JWTHeaderParameters, token: jose.FlattenedJWSInput) {
  if (!header.kid) throw new Error("no kid in the header");
  if (!keys.some(({ kid }) => kid === header.kid)) await refreshKeys();
  return await keySet!(header, token);
}

/** Fetches the keys, once at a time and once per cool-down. Throws if there are none. */
async function refreshKeys(): Promise<void> {
  if (!fetching && performance.now() - fetchedAt >= coolDownSeconds * 1000) {
    fetchedAt = performance.now();
    fetching = fetchKeys().finally(() => (fetching = undefined));
    fetching.catch(({ message: reason }: Error) => log("keys not fetched", { reason }));
  }
  await fetching?.catch(refuseAs("temporarily_unavailable"));
  if (!keySet) throw new Refusal("temporarily_unavailable", "no keys of the issuer yet");
}

async function fetchKeys(): Promise<void> {
  const signal = AbortSignal.timeout(5_000);
  const url = `${issuer}/.well-known/openid-configuration`;
  const metadata = await boundedFetch(url, { signal }, maxBytes).then(textOf);
  const { issuer: named, jwks_uri } = JSON.parse(metadata);
  // RFC 8414 §3.3: the issuer must be identical to the one that was asked; §2: https.
  if (named !== issuer) throw new Error("metadata of another issuer");
  requireOrigin("jwks_uri", new URL(jwks_uri).origin);
  const rest = maxBytes - Buffer.byteLength(metadata);
  const text = await boundedFetch(jwks_uri, { signal }, rest).then(textOf);
  const usable: jose.JWK[] = JSON.parse(text).keys.filter(isUsable);
  if (!usable.length) throw new Error("no usable key in the JWK Set");
  if (Bun.deepEquals(usable, keys)) return;
  keys = usable;
  keySet = jose.createLocalJWKSet({ keys });
  remembered.clear();
}

const isUsable = (jwk?: jose.JWK) => isText(jwk?.kid) && /^(EC|RSA|OKP|AKP)$/.test(`${jwk?.kty}`);

const textOf = (answer: Response) =>
  answer.status === 200 ? answer.text() : Promise.reject(new Error(`status ${answer.status}`));

// --- Routes --------------------------------------------------------------------------------------

/** What GET answers, by path. */
const documents = new Map<string, (request: Request) => Response | Promise<Response>>([
  ["/identity", identity],
  ["/.well-known/oauth-protected-resource", metadata],
  ["/health", health],
]);

function route(request: Request) {
  const document = documents.get(pathOf(request));
  if (!document) return reply("Not Found", 404);
  const allowed = request.method === "GET" || request.method === "HEAD";
  return allowed ? document(request) : reply("Method Not Allowed", 405, { allow: "GET, HEAD" });
}

/** Cut out by hand, for it is not always part of an absolute URL (HTTP/1.0, CONNECT). */
const pathOf = ({ url }: Request) => /^(?:https?:\/\/[^/?#]*)?([^?#]*)/.exec(url)![1]!;

function reply(text: string, status = 200, more: Record<string, string> = {}): Response {
  const headers = status === 200 ? json : { "cache-control": "no-store", ...more };
  const response = new Response(text, { status, headers });
  if (lifecycle.stopping) response.headers.set("connection", "close");
  return response;
}

/** The challenges of RFC 6750 §3 and RFC 9449 §7.1, the error at the scheme that was used. */
function refusal(error: Error, request: Request, http: Bun.Server<undefined>, started: number) {
  const known = error instanceof Refusal ? error : new Refusal("server_error", `${error.stack}`);
  const { code, message, details } = known;
  const entry = { address: http.requestIP(request)?.address, ...details, error: code };
  const milliseconds = Math.round(performance.now() - started);
  log("call refused", { ...entry, reason: message.slice(0, 2_000), milliseconds });
  const [status, text] = errors[code];
  if (status >= 500) return reply(text, status, { "retry-after": `${coolDownSeconds}` });
  const needed = details.scope ? `, scope="${details.scope}"` : "";
  const why = `error="${code}", error_description="${text}"${needed}, `;
  const used = /^dpop/i.test(request.headers.get("authorization") ?? "") ? "DPoP " : "Bearer ";
  const told = code === "no_credentials" ? challenges : challenges.replace(used, () => used + why);
  return reply(text, status, { "www-authenticate": told });
}

function identity(request: Request) {
  const claims = authorize(request, "api1"); // a copier changes the scope also in metadata()
  return claims instanceof Promise ? claims.then(show) : show(claims);
}

const shown = new WeakMap<Claims, string>();

/** The claims as a list, each value a string; the text is kept as long as the claims are. */
function show(claims: Claims): Response {
  const text = shown.get(claims) ?? JSON.stringify(Object.entries(claims).flatMap(listed));
  shown.set(claims, text);
  return reply(text);
}

const listed = ([type, value]: [string, unknown]) =>
  [value].flat().map((v) => ({ type, value: typeof v === "string" ? v : JSON.stringify(v) }));

/** RFC 9728 §2. */
function metadata(): Response {
  const document = {
    resource,
    resource_name: resourceServer.resource_name,
    authorization_servers: [issuer],
    scopes_supported: ["api1"],
    bearer_methods_supported: ["header"],
    dpop_signing_alg_values_supported: acceptedAlgorithms,
  };
  return reply(JSON.stringify(document));
}

/** Whether this instance should get calls. One without keys looks for them. */
function health(): Response {
  if (!keySet) refreshKeys().catch(() => {});
  if (keySet && !lifecycle.stopping) return reply('{"status":"ok"}');
  return reply('{"status":"unavailable"}', 503, { "content-type": "application/json" });
}

// --- Start ---------------------------------------------------------------------------------------

/** Starts the API, also while the issuer is down. Throws for mistakes in the configuration. */
export async function start() {
  requireOrigin("ISSUER", issuer);
  setInterval(() => keySet && refreshKeys().catch(() => {}), refreshSeconds * 1000).unref();
  return Bun.serve({
    ...(await listenOptions("API", requireOrigin("API_URL", resource))),
    development: false,
    maxRequestBodySize: 16_384,
    // Without a promise where none is needed: most calls come with a token that is remembered.
    fetch: (request, http) => {
      const started = performance.now();
      const answer = route(request);
      if (!(answer instanceof Promise)) return answer;
      return answer.catch((error) => refusal(error, request, http, started));
    },
  });
}

if (import.meta.main) {
  stopOnSignal(await start().catch(fail));
  console.error(`API: ${resource}`);
}
