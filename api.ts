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

import { hash } from "node:crypto";
import { STATUS_CODES } from "node:http";
import * as jose from "jose";
import { boundedFetch, fail, lifecycle, listenOptions, log } from "./config.ts";
import { requireOrigin, resourceServer, stopOnSignal } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

const { issuer, resource, acceptedAlgorithms, refreshSeconds, coolDownSeconds } = resourceServer;
const resource_metadata = `${resource}/.well-known/oauth-protected-resource`; // RFC 9728 §3
const leewaySeconds = 30;
const proofMaxAgeSeconds = 90;
const fetchTimeoutSeconds = 5;
const fetchMaxBytes = 1_048_576;
const maxRemembered = 1_000;
const maxRememberedLength = 4_096;
const maxUsedProofs = 50_000;
const privateMembers = "d p q dp dq qi oth k priv".split(" ");
const noStore = { "cache-control": "no-store" };
const jsonOptions = { headers: { ...noStore, "content-type": "application/json" } };
const secondsNow = () => Math.floor(Date.now() / 1000);

type Answer = Response | Promise<Response>;

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
} as const;

/** Why a caller is turned away; the reason goes to the log. */
export class Refusal extends Error {
  readonly code: keyof typeof errors;
  readonly scope: string | undefined;

  constructor(code: keyof typeof errors, reason: string, scope?: string) {
    super(reason);
    this.code = code;
    this.scope = scope;
  }
}

/** What a step finds wrong is an Error: this makes it a Refusal with the code of the step. */
function refuse(code: keyof typeof errors) {
  return (error: Error): never => {
    throw error instanceof Refusal ? error : new Refusal(code, error.message);
  };
}

// --- Authorization -------------------------------------------------------------------------------

/** Claims of valid tokens by the Authorization field they came in, oldest first. */
const remembered = new Map<string, Claims>();

/**
 * The caller's claims, without waiting if the token was seen before. Throws, or rejects with, a
 * Refusal for a caller who may not use `scope` (RFC 6750 §3).
 */
export function authorize(request: Request, scope: string): Claims | Promise<Claims> {
  const authorization = request.headers.get("authorization") ?? "";
  const claims = remembered.get(authorization);
  // Without leeway: a token that is about to expire is validated again.
  const known = claims && claims.exp > secondsNow() ? claims : undefined;
  if (known && !known.cnf) return requireScope(known, scope);
  return validateCall(request, scope, authorization, known);
}

async function validateCall(
  request: Request,
  scope: string,
  authorization: string,
  known?: Claims,
) {
  const { scheme, accessToken } = presentedToken(authorization);
  const claims = known ?? (await validateToken(accessToken).catch(refuse("invalid_token")));
  const jkt = claims.cnf?.jkt;
  if (scheme !== (jkt ? "dpop" : "bearer")) throw new Refusal("invalid_token", "the other scheme");
  if (jkt) await verifyProof(request, accessToken, jkt).catch(refuse("invalid_dpop_proof"));
  if (!known && authorization.length <= maxRememberedLength) {
    remembered.set(authorization, claims);
    if (remembered.size > maxRemembered) remembered.delete(remembered.keys().next().value!);
  }
  return requireScope(claims, scope);
}

/** RFC 6750 §2.1, RFC 9449 §7.1. */
function presentedToken(authorization: string) {
  // Two fields arrive as one, joined by a comma.
  const isOurs = /(^|, *)(Bearer|DPoP)( |$)/i.test(authorization);
  if (!isOurs) throw new Refusal("no_credentials", "no credentials of a known scheme");
  const [, scheme, accessToken] = /^(Bearer|DPoP) +([\w.~+/-]+=*)$/i.exec(authorization) ?? [];
  if (!scheme || !accessToken) throw new Refusal("invalid_request", "malformed Authorization");
  return { scheme: scheme.toLowerCase(), accessToken };
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
  for (const claim of [sub, client_id, jti]) {
    if (typeof claim !== "string" || !claim) throw new Error("no sub, client_id or jti");
  }
  // Of the ways to bind a token (RFC 7800 §3) this server knows one.
  if ("cnf" in payload && typeof cnf?.jkt !== "string") throw new Error("bound in an unknown way");
  return payload;
}

/** The claims, if their scope, a string or from other issuers an array, has this one. */
function requireScope(claims: Claims, scope: string): Claims {
  const granted = claims["scope"];
  const scopes = typeof granted === "string" ? granted.split(" ") : granted;
  if (Array.isArray(scopes) && scopes.includes(scope)) return claims;
  const { client_id, jti } = claims;
  throw new Refusal("insufficient_scope", `token ${jti} of ${client_id} lacks ${scope}`, scope);
}

// --- Proof of possession -------------------------------------------------------------------------

const usedProofs = new Set<string>();

/** RFC 9449 §4.3 and §7.1. Throws for a proof that does not fit this request and token. */
async function verifyProof(request: Request, accessToken: string, boundTo: string): Promise<void> {
  const proof = request.headers.get("dpop") ?? "";
  const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK, {
    typ: "dpop+jwt",
    algorithms: acceptedAlgorithms,
  });
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, iat = 0, jti, ath } = payload;
  if (crit) throw new Error("crit in the header");
  if (privateMembers.some((member) => member in jwk)) throw new Error("private key in the header");
  if (htm !== request.method) throw new Error("htm is another method");
  const { origin, pathname } = new URL(`${htu}`); // normalized, as RFC 3986 §6.2.2 and §6.2.3 say
  const uri = origin + pathname;
  if (uri !== new URL(resource + pathOf(request)).href) throw new Error("htu is another address");
  const age = secondsNow() - iat;
  if (age > proofMaxAgeSeconds || age < -leewaySeconds) throw new Error("iat too far from now");
  if (ath !== hash("sha256", accessToken, "base64url")) throw new Error("ath of another token");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  if (jkt !== boundTo) throw new Error("not the key that the token is bound to");
  if (typeof jti !== "string" || !jti) throw new Error("no jti");
  const used = hash("sha256", JSON.stringify([jkt, uri, jti]), "base64url");
  if (usedProofs.has(used)) throw new Error("jti used before");
  usedProofs.add(used);
  // Choice: the oldest is forgotten. To refuse instead would let one caller lock out the others.
  if (usedProofs.size > maxUsedProofs) usedProofs.delete(usedProofs.keys().next().value!);
}

// --- Keys of the issuer --------------------------------------------------------------------------

let jwks = "";
let kids = new Set<string | undefined>();
let keySet: ReturnType<typeof jose.createLocalJWKSet> | undefined;
let fetching: Promise<void> | undefined;
let fetchedAt = -Infinity;

/** The key that a token names; for an unknown one the keys are fetched again. */
async function issuerKey(header: jose.JWTHeaderParameters, token: jose.FlattenedJWSInput) {
  if (!header.kid) throw new Error("no kid in the header");
  if (!kids.has(header.kid)) await refreshKeys();
  return await keySet!(header, token);
}

/** Fetches the keys, once at a time and once per cool-down. Throws if there are none. */
async function refreshKeys(): Promise<void> {
  if (performance.now() - fetchedAt >= coolDownSeconds * 1000) {
    fetchedAt = performance.now();
    fetching = fetchKeys().finally(() => (fetching = undefined));
  }
  await fetching?.catch((error: Error) => {
    log("keys not fetched", { reason: error.message });
    throw new Refusal("temporarily_unavailable", `keys not fetched: ${error.message}`);
  });
  if (!keySet) throw new Refusal("temporarily_unavailable", "no keys of the issuer yet");
}

async function fetchKeys(): Promise<void> {
  const signal = AbortSignal.timeout(fetchTimeoutSeconds * 1000);
  const url = `${issuer}/.well-known/openid-configuration`;
  const metadata = await (await boundedFetch(url, { signal }, fetchMaxBytes)).text();
  const { issuer: named, jwks_uri } = JSON.parse(metadata);
  // RFC 8414 §3.3: the issuer must be identical to the one that was asked.
  if (named !== issuer) throw new Error("metadata of another issuer");
  const rest = fetchMaxBytes - metadata.length;
  const text = await (await boundedFetch(jwks_uri, { signal }, rest)).text();
  if (text === jwks) return;
  const { keys }: jose.JSONWebKeySet = JSON.parse(text);
  const usable = keys.filter(({ kid, kty }) => kid && kty !== "oct");
  if (!usable.length) throw new Error("no usable key in the JWK Set");
  keySet = jose.createLocalJWKSet({ keys: usable });
  kids = new Set(usable.map(({ kid }) => kid));
  jwks = text;
  remembered.clear();
}

// --- Routes --------------------------------------------------------------------------------------

/** What GET answers, by path. */
const documents = new Map<string, (request: Request) => Answer>([
  ["/identity", identity],
  ["/.well-known/oauth-protected-resource", metadata],
  ["/health", health],
]);

function route(request: Request): Answer {
  const document = documents.get(pathOf(request));
  if (!document) return plain(404);
  const allowed = request.method === "GET" || request.method === "HEAD";
  return allowed ? document(request) : plain(405, { allow: "GET, HEAD" });
}

/** Cut out by hand, for it is not always part of an absolute URL (HTTP/1.0, CONNECT). */
function pathOf({ url }: Request): string {
  return /^(?:https?:\/\/[^/?#]*)?([^?#]*)/.exec(url)?.[1] ?? "";
}

function plain(status: number, headers = {}, text = STATUS_CODES[status]): Response {
  return new Response(text, { status, headers: { ...noStore, ...headers } });
}

function identity(request: Request): Answer {
  const claims = authorize(request, "api1");
  return claims instanceof Promise ? claims.then(show) : show(claims);
}

const shown = new WeakMap<Claims, string>();

/** The claims as a list, each value a string; the text is kept as long as the claims are. */
function show(claims: Claims): Response {
  const text = shown.get(claims) ?? JSON.stringify(Object.entries(claims).flatMap(listed));
  shown.set(claims, text);
  return new Response(text, jsonOptions);
}

function listed([type, value]: [string, unknown]) {
  const text = (member: unknown) => (typeof member === "string" ? member : JSON.stringify(member));
  return [value].flat().map((member) => ({ type, value: text(member) }));
}

/** RFC 9728 §2. */
function metadata(): Response {
  return Response.json({
    resource,
    resource_name: resourceServer.resource_name,
    authorization_servers: [issuer],
    scopes_supported: ["api1"],
    bearer_methods_supported: ["header"],
    dpop_signing_alg_values_supported: acceptedAlgorithms,
  });
}

/** Whether this instance should get calls. One without keys looks for them. */
function health(): Response {
  if (!keySet) refreshKeys().catch(() => {});
  const ready = keySet && !lifecycle.stopping;
  const options = { status: ready ? 200 : 503, headers: noStore };
  return Response.json({ status: ready ? "ok" : "unavailable" }, options);
}

/** The challenges of RFC 6750 §3 and RFC 9449 §7.1, the error at the scheme that was used. */
function refusal(error: unknown, request: Request, address: string): Response {
  if (!(error instanceof Refusal)) throw error;
  const { code, message: reason, scope } = error;
  log("call refused", { address, error: code, reason });
  const [status, text] = errors[code];
  if (status === 503) return plain(status, { "retry-after": `${coolDownSeconds}` });
  const details = `, error="${code}", error_description="${text}"${scope ? `, scope="${scope}"` : ""}`;
  const shown = code === "no_credentials" ? "" : details;
  const isDpop = /^dpop /i.test(request.headers.get("authorization") ?? "");
  const where = `resource_metadata="${resource_metadata}"`;
  const bearer = `Bearer ${where}${isDpop ? "" : shown}`;
  const dpop = `DPoP algs="${acceptedAlgorithms.join(" ")}", ${where}${isDpop ? shown : ""}`;
  return plain(status, { "www-authenticate": `${bearer}, ${dpop}` }, text);
}

// --- Start ---------------------------------------------------------------------------------------

/** Starts the API, also while the issuer is down. Throws for mistakes in the configuration. */
export async function start() {
  requireOrigin("ISSUER", issuer);
  const origin = requireOrigin("API_URL", resource);
  setInterval(() => keySet && refreshKeys().catch(() => {}), refreshSeconds * 1000).unref();
  return Bun.serve({
    ...(await listenOptions("API", origin, resourceServer.listen)),
    development: false,
    maxRequestBodySize: 16_384,
    fetch: (request, http) => {
      const answer = respond(request, http.requestIP(request)?.address ?? "");
      return lifecycle.stopping ? closing(answer) : answer;
    },
    error: (error) => {
      log("request failed", { reason: `${error.stack}`.slice(0, 2_000) });
      return plain(500);
    },
  });
}

/** Without a promise where none is needed: most calls come with a token that is remembered. */
function respond(request: Request, address: string): Answer {
  try {
    const answer = route(request);
    if (!(answer instanceof Promise)) return answer;
    return answer.catch((error) => refusal(error, request, address));
  } catch (error) {
    return refusal(error, request, address);
  }
}

async function closing(answer: Answer): Promise<Response> {
  const response = await answer;
  response.headers.set("connection", "close");
  return response;
}

if (import.meta.main) {
  stopOnSignal(await start().catch(fail));
  console.error(`API: ${resource}`);
}
