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
 * Run: bun run api.ts
 */

import { hash } from "node:crypto";
import { STATUS_CODES } from "node:http";
import * as jose from "jose";
import { fail, fetchText, lifecycle, listenOptions, log } from "./config.ts";
import { requireOrigin, resourceServer, stopOnSignal } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

type Configuration = typeof resourceServer;
type Answer = Response | Promise<Response>;

/** The claims of an access token (RFC 9068 §2.2) that is valid here. */
export type Claims = jose.JWTPayload & { client_id: string; exp: number };

const leewaySeconds = 30;
const proofMaxAgeSeconds = 90;
const fetchTimeoutSeconds = 5;
const fetchMaxBytes = 1_048_576;
const maxRememberedTokens = 1_000;
const maxRememberedLength = 4_096;
const maxUsedProofs = 50_000;
const metadataPath = "/.well-known/oauth-protected-resource"; // RFC 9728 §3
const privateMembers = "d p q dp dq qi oth k priv".split(" ");
const noStore = { "cache-control": "no-store" };
const json = { headers: { ...noStore, "content-type": "application/json" } };
const secondsNow = () => Math.floor(Date.now() / 1000);

// --- Errors --------------------------------------------------------------------------------------

/** RFC 6750 §3.1, RFC 9449 §7.1: each code with its status and a constant text. */
const errors = {
  invalid_request: [400, "The Authorization field is malformed."],
  invalid_token: [401, "The access token is not valid here. The log of the API has the reason."],
  invalid_dpop_proof: [401, "The DPoP proof is missing or not valid."],
  insufficient_scope: [403, "The access token lacks the scope."],
} as const;

/** Why a caller is turned away. Without a code no credentials came, which is no error (§3.1). */
export class Refusal extends Error {
  readonly code: keyof typeof errors | undefined;
  readonly details: Record<string, unknown>;

  constructor(code: keyof typeof errors | undefined, reason: string, details = {}) {
    super(reason);
    this.code = code;
    this.details = details;
  }
}

/** The issuer's keys cannot be had now: 503, for the token may be a good one. */
export class Unavailable extends Error {}

/** For what a step finds wrong with the request: an Error becomes a Refusal with this code. */
function refuse(code: keyof typeof errors) {
  return (error: Error): never => {
    throw error instanceof Unavailable ? error : new Refusal(code, error.message);
  };
}

// --- Authorization -------------------------------------------------------------------------------

/** Decides who may call. A copier keeps this class, and calls `authorize` where a handler begins. */
export class ResourceServer {
  readonly #configuration: Configuration;
  /** By the value of the Authorization field, oldest first. */
  readonly #remembered = new Map<string, Claims>();
  readonly #usedProofs = new Set<string>();
  #kids = new Set<string | undefined>();
  #keySet: ReturnType<typeof jose.createLocalJWKSet> | undefined;
  #jwks = "";
  #fetching: Promise<void> | undefined;
  #fetchedAt = -Infinity;

  constructor(configuration: Configuration) {
    this.#configuration = configuration;
  }

  /**
   * The caller's claims, without waiting if the token was seen before. Throws or rejects with a
   * Refusal for a caller who may not use `scope` (RFC 6750 §3), or with Unavailable.
   */
  authorize(request: Request, scope: string): Claims | Promise<Claims> {
    const authorization = request.headers.get("authorization") ?? "";
    const remembered = this.#remembered.get(authorization);
    // Without leeway: a token that is about to expire is validated again.
    const claims = remembered && remembered.exp > secondsNow() ? remembered : undefined;
    if (claims && !claims["cnf"]) return requireScope(claims, scope);
    return this.#authorize(request, authorization, claims, scope);
  }

  async #authorize(
    request: Request,
    authorization: string,
    known: Claims | undefined,
    scope: string,
  ) {
    const { scheme, accessToken } = presentedToken(authorization);
    const claims = known ?? (await this.#validate(accessToken).catch(refuse("invalid_token")));
    if ((scheme === "DPoP") !== "cnf" in claims) {
      throw new Refusal(
        "invalid_token",
        "a bound token goes with DPoP, an unbound one with Bearer",
      );
    }
    if (scheme === "DPoP") {
      await this.#verifyProof(request, accessToken, claims).catch(refuse("invalid_dpop_proof"));
    }
    if (!known && authorization.length <= maxRememberedLength) {
      this.#remembered.set(authorization, claims);
      if (this.#remembered.size > maxRememberedTokens) deleteOldest(this.#remembered);
    }
    return requireScope(claims, scope);
  }

  /** RFC 9068 §4. Throws for a token that is not valid here. */
  async #validate(accessToken: string): Promise<Claims> {
    const { issuer, resource, acceptedAlgorithms } = this.#configuration;
    const getKey: jose.JWTVerifyGetKey = (header, jws) => this.#key(header, jws);
    const { payload, protectedHeader } = await jose.jwtVerify(accessToken, getKey, {
      typ: "at+jwt", // or application/at+jwt
      algorithms: acceptedAlgorithms,
      issuer,
      audience: resource,
      requiredClaims: ["exp", "iat"],
      clockTolerance: leewaySeconds,
    });
    if (protectedHeader.crit) throw new Error("crit in the header");
    for (const name of ["sub", "client_id", "jti"]) {
      if (typeof payload[name] !== "string" || !payload[name]) throw new Error(`no ${name}`);
    }
    return payload as Claims;
  }

  /** RFC 9449 §4.3 and §7.1. Throws for a proof that does not fit this request and token. */
  async #verifyProof(request: Request, accessToken: string, { cnf }: Claims): Promise<void> {
    const proof = request.headers.get("dpop") ?? "";
    const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK, {
      typ: "dpop+jwt",
      algorithms: this.#configuration.acceptedAlgorithms,
    });
    const { crit, jwk = {} } = protectedHeader;
    const { htm, htu, iat = 0, jti, ath } = payload;
    if (crit) throw new Error("crit in the header");
    if (privateMembers.some((member) => member in jwk))
      throw new Error("private key in the header");
    if (htm !== request.method) throw new Error("htm is another method");
    const uri = this.#configuration.resource + pathOf(request);
    if (withoutQuery(htu) !== withoutQuery(uri)) throw new Error("htu is another address");
    const age = secondsNow() - iat;
    if (age > proofMaxAgeSeconds || age < -leewaySeconds) throw new Error("iat too far from now");
    if (ath !== hash("sha256", accessToken, "base64url")) throw new Error("ath of another token");
    const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
    if (jkt !== (cnf as { jkt?: unknown }).jkt)
      throw new Error("not the key the token is bound to");
    if (typeof jti !== "string" || !jti) throw new Error("no jti");
    // Choice: the oldest is forgotten first. To refuse would let one caller lock out the others.
    const used = hash("sha256", JSON.stringify([jkt, uri, jti]), "base64url");
    if (this.#usedProofs.has(used)) throw new Error("jti used before");
    this.#usedProofs.add(used);
    if (this.#usedProofs.size > maxUsedProofs) deleteOldest(this.#usedProofs);
  }

  /** Whether tokens can be verified. */
  get ready(): boolean {
    return this.#keySet !== undefined;
  }

  /** The issuer's key that a token names; for an unknown one the keys are fetched again. */
  async #key(header: jose.JWTHeaderParameters, jws: jose.FlattenedJWSInput) {
    if (!header.kid) throw new Error("no kid in the header");
    if (!this.#kids.has(header.kid)) await this.fetchKeys();
    return await this.#keySet!(header, jws);
  }

  /** Fetches the issuer's keys, once at a time and once per cool-down. Throws Unavailable. */
  async fetchKeys(): Promise<void> {
    const elapsedSeconds = (performance.now() - this.#fetchedAt) / 1000;
    if (elapsedSeconds >= this.#configuration.coolDownSeconds) {
      this.#fetchedAt = performance.now();
      this.#fetching = this.#fetchKeys().finally(() => (this.#fetching = undefined));
    }
    await this.#fetching;
    if (!this.#keySet) throw new Unavailable("no keys of the issuer yet");
  }

  async #fetchKeys(): Promise<void> {
    const { issuer } = this.#configuration;
    const signal = AbortSignal.timeout(fetchTimeoutSeconds * 1000);
    try {
      const url = `${issuer}/.well-known/openid-configuration`;
      const metadata = await fetchText(url, { signal }, fetchMaxBytes);
      const { issuer: named, jwks_uri } = JSON.parse(metadata.text);
      // RFC 8414 §3.3: the issuer must be identical to the one that was asked.
      if (named !== issuer) throw new Error("metadata of another issuer");
      const jwks = await fetchText(jwks_uri, { signal }, fetchMaxBytes - metadata.text.length);
      this.#useKeys(jwks.text);
    } catch (error) {
      const reason = `keys of ${issuer}: ${(error as Error).message}`;
      log("keys not fetched", { reason });
      throw new Unavailable(reason);
    }
  }

  #useKeys(text: string): void {
    if (text === this.#jwks) return;
    const { keys }: jose.JSONWebKeySet = JSON.parse(text);
    const usable = keys.filter(({ kid, kty }) => kid && kty !== "oct");
    if (!usable.length) throw new Error("no usable key in the JWK Set");
    this.#keySet = jose.createLocalJWKSet({ keys: usable });
    this.#kids = new Set(usable.map(({ kid }) => kid));
    this.#jwks = text;
    this.#remembered.clear();
  }
}

/** RFC 6750 §2.1 and RFC 9449 §7.1: absent, malformed, or a token with its scheme. */
function presentedToken(authorization: string) {
  // Two fields arrive as one, joined by a comma.
  if (!/(^|, *)(Bearer|DPoP)( |$)/i.test(authorization)) throw new Refusal(undefined, "no token");
  const [, scheme, accessToken] = /^(Bearer|DPoP) +([\w.~+/-]+=*)$/i.exec(authorization) ?? [];
  if (!scheme || !accessToken) throw new Refusal("invalid_request", "malformed Authorization");
  return { scheme: scheme.length === 4 ? "DPoP" : "Bearer", accessToken };
}

/** The claims, if `scope` is among theirs, which is a string or, from other issuers, an array. */
function requireScope(claims: Claims, scope: string): Claims {
  const granted = claims["scope"];
  const scopes = typeof granted === "string" ? granted.split(" ") : granted;
  if (Array.isArray(scopes) && scopes.includes(scope)) return claims;
  const { client_id, jti } = claims;
  throw new Refusal("insufficient_scope", "scope missing", { client_id, jti, scope });
}

function deleteOldest(collection: Map<string, unknown> | Set<string>): void {
  for (const oldest of collection.keys()) return void collection.delete(oldest);
}

/** Normalized by the URL parser (RFC 3986 §6.2.2, §6.2.3). Throws TypeError for what is no URL. */
function withoutQuery(url: unknown): string {
  const { origin, pathname } = new URL(typeof url === "string" ? url : "");
  return origin + pathname;
}

// --- Routes --------------------------------------------------------------------------------------

/** The path that was asked for: not always part of an absolute URL (HTTP/1.0, CONNECT). */
function pathOf({ url }: Request): string {
  return /^(?:https?:\/\/[^/?#]*)?([^?#]*)/.exec(url)?.[1] ?? "";
}

function route(api: ResourceServer, configuration: Configuration, request: Request): Answer {
  const path = pathOf(request);
  const document = documents.get(path);
  if (!document) return plain(404);
  if (!/^(GET|HEAD)$/.test(request.method)) return plain(405, { allow: "GET, HEAD" });
  return document(api, request, configuration);
}

const documents = new Map<
  string,
  (api: ResourceServer, request: Request, configuration: Configuration) => Answer
>([
  ["/identity", identity],
  [metadataPath, metadata],
  ["/health", health],
]);

function plain(status: number, headers?: Record<string, string>): Response {
  return new Response(STATUS_CODES[status], { status, headers: { ...noStore, ...headers } });
}

/** The caller's claims, each value as a string. */
function identity(api: ResourceServer, request: Request): Answer {
  const claims = api.authorize(request, "api1");
  return claims instanceof Promise ? claims.then(showClaims) : showClaims(claims);
}

/** The text of the answer is kept as long as the claims are remembered. */
const shown = new WeakMap<Claims, string>();

function showClaims(claims: Claims): Response {
  let text = shown.get(claims);
  if (text === undefined) {
    const entries = Object.entries(claims).flatMap(([type, value]) =>
      [value]
        .flat()
        .map((one) => ({ type, value: typeof one === "object" ? JSON.stringify(one) : `${one}` })),
    );
    text = JSON.stringify(entries);
    shown.set(claims, text);
  }
  return new Response(text, json);
}

/** RFC 9728 §2. */
function metadata(_api: ResourceServer, _request: Request, configuration: Configuration): Response {
  const { resource, resource_name, issuer, acceptedAlgorithms } = configuration;
  return Response.json(
    {
      resource,
      resource_name,
      authorization_servers: [issuer],
      scopes_supported: ["api1"],
      bearer_methods_supported: ["header"],
      dpop_signing_alg_values_supported: acceptedAlgorithms,
    },
    { headers: { "cache-control": "public, max-age=3600" } },
  );
}

function health(api: ResourceServer): Response {
  if (!api.ready) api.fetchKeys().catch(() => {});
  const ready = api.ready && !lifecycle.stopping;
  return Response.json(
    { status: ready ? "ok" : "unavailable" },
    { status: ready ? 200 : 503, headers: noStore },
  );
}

/** The challenges of RFC 6750 §3 and RFC 9449 §7.1, with the error at the scheme that was used. */
function refusal(
  error: unknown,
  request: Request,
  { resource, acceptedAlgorithms }: Configuration,
): Response {
  if (error instanceof Unavailable) return plain(503, { "retry-after": "5" });
  if (!(error instanceof Refusal)) throw error;
  const { code, message: reason, details } = error;
  log("call refused", { error: code, reason, ...details });
  const [status, text] = code ? errors[code] : ([401, "An access token is needed."] as const);
  const where = `resource_metadata="${resource}${metadataPath}"`;
  const scope = code === "insufficient_scope" ? `, scope="${details["scope"]}"` : "";
  const why = code ? `, error="${code}", error_description="${text}"${scope}` : "";
  const isDpop = /^DPoP /i.test(request.headers.get("authorization") ?? "");
  const bearer = `Bearer ${where}${isDpop ? "" : why}`;
  const dpop = `DPoP algs="${acceptedAlgorithms.join(" ")}", ${where}${isDpop ? why : ""}`;
  return new Response(text, {
    status,
    headers: { ...noStore, "www-authenticate": `${bearer}, ${dpop}` },
  });
}

// --- Start ---------------------------------------------------------------------------------------

/** Starts the API, also while the issuer is down. Throws for mistakes in the configuration. */
export async function start(configuration = resourceServer) {
  requireOrigin("ISSUER", configuration.issuer);
  const origin = requireOrigin("API_URL", configuration.resource);
  const api = new ResourceServer(configuration);
  setInterval(
    () => api.ready && api.fetchKeys().catch(() => {}),
    configuration.refreshSeconds * 1000,
  ).unref();
  return Bun.serve({
    ...(await listenOptions("API", origin, configuration.listen)),
    development: false,
    maxRequestBodySize: 16_384,
    fetch: (request, http) => {
      try {
        const answer = route(api, configuration, request);
        return answer instanceof Promise
          ? answer.catch((error) => refusal(error, request, configuration))
          : answer;
      } catch (error) {
        return refusal(error, request, configuration);
      }
    },
    error: (error) => {
      log("request failed", { reason: `${error.stack}`.slice(0, 2_000) });
      return plain(500);
    },
  });
}

async function main(): Promise<void> {
  stopOnSignal(await start());
  console.error(`API: ${resourceServer.resource}`);
}

if (import.meta.main) main().catch(fail);
