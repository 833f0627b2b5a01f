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
 * For an API of your own keep everything, and add to `routes`. Run: bun run api.ts
 */

import * as jose from "jose";
import * as config from "./config.ts";

type Settings = config.ResourceServerSettings;

/** The claims of an access token (RFC 9068 §2.2) that is valid here. They are frozen. */
export type Claims = Readonly<
  jose.JWTPayload & { client_id: string; exp: number; cnf?: { jkt?: string } }
>;

// --- Errors --------------------------------------------------------------------------------------

/**
 * RFC 6750 §3.1, RFC 9449 §7.1: each code with its status and a constant text. No challenge
 * names the first or the last code; the caller sees their status and text.
 */
const errors = {
  no_credentials: [401, "An access token is needed."],
  invalid_request: [400, "The Authorization field or the body is malformed."],
  invalid_token: [401, "The access token is not valid here. The log of the API has the reason."],
  invalid_dpop_proof: [401, "The DPoP proof is missing or not valid."],
  insufficient_scope: [403, "The access token lacks the scope."],
  temporarily_unavailable: [503, "The token cannot be checked now. Try again soon."],
} as const;

type ErrorCode = keyof typeof errors;
const refuseAs = config.refuseAs<ErrorCode>;

function check(holds: unknown, code: ErrorCode, reason: string, details = {}): asserts holds {
  if (!holds) throw new config.Refusal(code, reason, details);
}

// --- Routes --------------------------------------------------------------------------------------

/** What the API answers; an API of your own adds its lines here, such as "POST /orders". */
const routes = (api: ResourceServer): config.Routes => ({
  "GET /identity": async (request) => {
    const claims = await api.authorize(request, api.settings.scope);
    return new Response(identityText(claims), { headers: jsonHeaders });
  },
  "GET /.well-known/oauth-protected-resource": () =>
    Response.json(metadata(api.settings), { headers: jsonHeaders }),
  "GET /health": () => api.health(),
});

/**
 * The JSON body of a request, for a POST. Rejects with a refusal, status 400, if it is malformed.
 */
export async function jsonBody(request: Request): Promise<unknown> {
  return await request.json().catch(() => check(false, "invalid_request", "The body is no JSON."));
}

const jsonHeaders = { "cache-control": "no-store", "content-type": "application/json" };

// Making the text takes a third of a call with a remembered token, and claims never change.
const identityTexts = new WeakMap<Claims, string>();
function identityText(claims: Claims): string {
  const text = identityTexts.get(claims) ?? JSON.stringify(identityOf(claims));
  identityTexts.set(claims, text);
  return text;
}

/** Types and values, each value a string; a claim that is a list becomes one entry per member. */
function identityOf(claims: Claims): { type: string; value: string }[] {
  const asText = (value: unknown) => (typeof value === "string" ? value : JSON.stringify(value));
  return Object.entries(claims).flatMap(([type, value]) =>
    [value].flat().map((member) => ({ type, value: asText(member) })),
  );
}

// --- Authorization -------------------------------------------------------------------------------

class ResourceServer {
  readonly settings: Settings;
  readonly issuerKeys: IssuerKeys;
  readonly lifecycle: config.Lifecycle;
  /** Claims by the Authorization field they came in, with the keys they were verified with. */
  readonly #remembered = new Map<string, { claims: Claims; keys: jose.JWK[] }>();
  readonly #usedProofs = new UsedProofs();

  constructor(settings: Settings) {
    const log = new config.Log(settings.log);
    this.settings = settings;
    this.issuerKeys = new IssuerKeys(settings, log);
    this.lifecycle = new config.Lifecycle(log, this.#refuse);
  }

  /**
   * Resolves with the claims of a caller who may use `scope`. Rejects with a refusal for any other
   * (RFC 6750 §3). Call it once for a request: a second call finds the proof used up.
   */
  async authorize(request: Request, scope: string): Promise<Claims> {
    const authorization = request.headers.get("authorization") ?? "";
    const claims = this.#recall(authorization) ?? (await this.#acceptToken(authorization));
    // A proof is for one request, so it is verified also with a remembered token.
    const proof = claims.cnf && (await verifyProof(this.settings, request, claims));
    const { client_id, jti, scope: granted } = claims;
    if (!hasScope(granted, scope)) {
      const reason = `The API wants scope ${scope}, the token has ${JSON.stringify(granted)}.`;
      throw new config.Refusal("insufficient_scope", reason, { scope, client_id, jti });
    }
    // Only now: who may not use the API must not fill the memory of those who may.
    if (proof) this.#usedProofs.use(client_id, proof, this.settings.maxUsedProofs);
    return claims;
  }

  /** The claims of a token that was accepted before. */
  #recall(authorization: string): Claims | undefined {
    // The whole field is the key, so that the scheme counts as well.
    const known = this.#remembered.get(authorization);
    if (known?.keys !== this.issuerKeys.keys || !this.issuerKeys.areUsable) return undefined;
    // Without leeway: a token past its exp, but within the leeway, is validated again each time.
    return known.claims.exp > config.secondsAt(this.settings.clock) ? known.claims : undefined;
  }

  /** Validates the token of an Authorization field, and remembers it. */
  async #acceptToken(authorization: string): Promise<Claims> {
    const { scheme, accessToken } = presentedToken(authorization);
    // If the keys change while the token is verified, the memory of it will not count.
    const { keys } = this.issuerKeys;
    const claims = await validateToken(this.settings, this.issuerKeys, accessToken);
    const wanted = claims.cnf ? "dpop" : "bearer";
    const reason = `The token must be sent with scheme ${wanted}, not ${scheme}.`;
    check(scheme === wanted, "invalid_token", reason, { client_id: claims.client_id });
    if (authorization.length > 4_096) return claims;
    this.#remembered.set(authorization, { claims, keys });
    const [oldest = ""] = this.#remembered.keys();
    if (this.#remembered.size > 1_000) this.#remembered.delete(oldest);
    return claims;
  }

  readonly #refuse: config.AnswerRefusal = (refusal, log, request) => {
    const code = refusal.code as ErrorCode;
    log("call refused", { ...refusal.details, error: code, reason: refusal.message });
    const [status, text] = errors[code];
    const headers = new Headers({ "cache-control": "no-store" });
    if (status === 503) headers.set("retry-after", `${Math.ceil(this.settings.coolDownSeconds)}`);
    else headers.set("www-authenticate", challenges(this.settings, refusal, request));
    return new Response(text, { status, headers });
  };

  /** Whether this instance should get calls. One without keys looks for them. */
  health(): Response {
    if (!this.issuerKeys.areUsable) this.issuerKeys.refreshInBackground();
    const isReady = this.issuerKeys.areUsable && !this.lifecycle.isStopping;
    const init = { status: isReady ? 200 : 503, headers: jsonHeaders };
    return Response.json({ status: isReady ? "ok" : "unavailable" }, init);
  }
}

/** RFC 6750 §2.1, RFC 9449 §7.1: the scheme in lower case, for its case does not count. */
function presentedToken(authorization: string): { scheme: string; accessToken: string } {
  const [, scheme, accessToken] = /^(Bearer|DPoP) +([\w.~+/-]+=*)$/i.exec(authorization) ?? [];
  if (scheme && accessToken) return { scheme: scheme.toLowerCase(), accessToken };
  // Two fields arrive as one, joined by a comma, so the scheme need not stand at the start.
  const isOurs = /(^|, *)(Bearer|DPoP)( |$)/i.test(authorization);
  check(!isOurs, "invalid_request", "The Authorization field has no well-formed access token.");
  throw new config.Refusal<ErrorCode>("no_credentials", "The request has no access token.");
}

/** RFC 9068 §4. Rejects with invalid_token for a token that is not valid here. */
async function validateToken(settings: Settings, keys: IssuerKeys, jwt: string): Promise<Claims> {
  const { issuer, resource: audience } = settings;
  const code = "invalid_token";
  // jose takes application/at+jwt as well.
  const own = { typ: "at+jwt", issuer, audience, requiredClaims: ["exp", "iat"] };
  const rules = { ...config.jwtRules(settings), ...own };
  const verifying = jose.jwtVerify<Claims>(jwt, keys.find, rules);
  const { payload, protectedHeader } = await verifying.catch(refuseAs(code, "The access token"));
  // Choice: a set of keys has several, so a token says which one it is by.
  check(protectedHeader.kid, code, "The token names no kid.");
  for (const claim of ["sub", "client_id", "jti"])
    check(config.isText(payload[claim]), code, `The token has no text as ${claim}.`);
  // RFC 7800 §3 has several ways to bind a token; this server knows one.
  const isKnown = !("cnf" in payload) || config.isText(payload.cnf?.jkt);
  check(isKnown, code, "The token is bound in another way than by jkt.");
  return deepFreeze(payload);
}

/**
 * Choice: other issuers send a list where RFC 9068 §2.2.3 has a string, so it counts as well. A
 * token without scope has none, even if `scope` is undefined.
 */
function hasScope(granted: unknown, scope: string): boolean {
  return (config.isText(granted) ? granted.split(" ") : [granted ?? []].flat()).includes(scope);
}

/** A remembered token is used for many calls: what a handler writes must not reach the next one. */
function deepFreeze<T>(value: T): T {
  if (typeof value === "object" && value !== null) Object.values(value).forEach(deepFreeze);
  return Object.freeze(value);
}

// --- Proof of possession -------------------------------------------------------------------------

/**
 * RFC 9449 §4.3 and §7.1. Resolves with the identifier of the proof, which may be used once.
 * Rejects with invalid_dpop_proof for a proof that does not fit this request and its token.
 */
async function verifyProof(settings: Settings, request: Request, claims: Claims): Promise<string> {
  const code = "invalid_dpop_proof";
  const details = { client_id: claims.client_id };
  const refuseUnless = (holds: unknown, reason: string) => check(holds, code, reason, details);
  const proof = request.headers.get("dpop") ?? "";
  const rules = { ...config.jwtRules(settings), ...config.proofRules };
  const verifying = jose.jwtVerify(proof, config.proofKey, rules);
  const refuseProof = refuseAs(code, "The DPoP proof", details);
  const { payload, protectedHeader } = await verifying.catch(refuseProof);
  const { htm, htu, jti, ath } = payload;
  // §4.3 (9): without query and fragment, normalized by `new URL`. Our side is the configured URL,
  // never Host or X-Forwarded-*, which anybody can write.
  const { href } = new URL(config.pathOf(request, settings.resource) ?? "", settings.resource);
  const [target] = URL.parse(config.isText(htu) ? htu : "")?.href.split(/[?#]/) ?? [];
  const named = JSON.stringify([htm, htu]);
  const isForThis = htm === request.method && target === href;
  refuseUnless(isForThis, `The DPoP proof is for ${named}, this is ${request.method} ${href}.`);
  const [, accessToken = ""] = (request.headers.get("authorization") ?? "").split(/ +/);
  const hash = config.sha256(accessToken, "base64url");
  refuseUnless(ath === hash, "The ath of the DPoP proof is of another token.");
  const jkt = await jose.calculateJwkThumbprint(protectedHeader.jwk as jose.JWK);
  refuseUnless(jkt === claims.cnf?.jkt, "The DPoP proof is by another key than the token's.");
  refuseUnless(config.isText(jti), "The DPoP proof has no jti.");
  return config.sha256(JSON.stringify([jkt, href, jti]), "base64url");
}

/**
 * The proofs that were used at this process, so that it accepts none twice (RFC 9449 §11.1); other
 * processes do not know them. They are forgotten only when there are too many of them.
 */
class UsedProofs {
  readonly #byClient = new Map<string, Set<string>>();
  #count = 0;

  /** Throws a refusal if the proof was used before. At most `maximum` are remembered. */
  use(client_id: string, proof: string, maximum: number): void {
    const proofs = this.#byClient.get(client_id) ?? new Set();
    check(!proofs.has(proof), "invalid_dpop_proof", "The DPoP proof is used up.", { client_id });
    this.#byClient.set(client_id, proofs.add(proof));
    this.#count++;
    if (this.#count <= maximum) return;
    // Choice: the client with the most proofs loses its oldest, so that one that floods does not
    // make the API forget those of others. Nobody is refused because the memory is full.
    const most = [...this.#byClient.values()].reduce((a, b) => (b.size > a.size ? b : a));
    const [oldest = ""] = most;
    most.delete(oldest);
    this.#count--;
  }
}

// --- Keys of the issuer --------------------------------------------------------------------------

/** The issuer's public keys, found through its metadata and refreshed in the background. */
class IssuerKeys extends config.PublicKeys {
  readonly #timer: Timer;

  constructor(settings: Settings, log: config.Log) {
    const { coolDownSeconds, keepKeysSeconds, refreshSeconds, clock } = settings;
    const logFailure = (error: unknown) => {
      log.write("keys not fetched", { reason: config.reasonOf(error) });
      throw error;
    };
    const fetchKeys = (signal: AbortSignal) => fetchIssuerKeys(settings, signal).catch(logFailure);
    // No call waits for newer keys, as long as there are any: the timer fetches them.
    const ages = { refetchAfterSeconds: keepKeysSeconds, keepSeconds: keepKeysSeconds };
    super({ fetchKeys, coolDownSeconds, ...ages, clock });
    // An API that has no keys fetches them at the next call or /health.
    const refreshKnown = () => this.areUsable && this.refreshInBackground();
    // A timer takes no delay of over 24 days.
    this.#timer = setInterval(refreshKnown, Math.min(refreshSeconds, 2_100_000) * 1000).unref();
  }

  /** Waits for nothing. The log has what fails. */
  refreshInBackground = () => void this.refresh().catch(() => {});

  close = () => clearInterval(this.#timer);
}

async function fetchIssuerKeys({ issuer, tls }: Settings, signal: AbortSignal) {
  const url = config.metadataUrl(issuer);
  const { issuer: named, jwks_uri } = await config.fetchJson(url, signal, tls);
  // RFC 8414 §3.3: the issuer in the metadata MUST be identical to the one that was asked.
  if (named !== issuer) throw new Error(`The metadata is of issuer ${named}, not ${issuer}.`);
  return await config.fetchJwkSet(String(jwks_uri), signal, tls);
}

// --- Metadata and challenges ---------------------------------------------------------------------

/** RFC 9728 §2. */
function metadata(settings: Settings): object {
  const { resource, resource_name, issuer, scope, acceptedAlgorithms } = settings;
  return {
    resource,
    resource_name,
    authorization_servers: [issuer],
    scopes_supported: [scope],
    bearer_methods_supported: ["header"],
    dpop_signing_alg_values_supported: acceptedAlgorithms,
  };
}

/** RFC 6750 §3, RFC 9449 §7.1, RFC 9728 §5.1; the error stands at the scheme that was used. */
function challenges(settings: Settings, refusal: config.Refusal, request: Request): string {
  const code = refusal.code as ErrorCode;
  // RFC 6750 §3.1: no error where no credentials came.
  const error =
    code === "no_credentials" ? {} : { error: code, error_description: errors[code][1] };
  const why = { ...error, scope: refusal.details["scope"] };
  const algs = settings.acceptedAlgorithms.join(" ");
  const resource_metadata = config.wellKnownUrl(settings.resource, "oauth-protected-resource");
  const usesDpop = /^dpop/i.test(request.headers.get("authorization") ?? "");
  const bearer = challenge("Bearer", { ...(!usesDpop && why), resource_metadata });
  const dpop = challenge("DPoP", { ...(usesDpop && why), algs, resource_metadata });
  return `${bearer}, ${dpop}`;
}

/** A challenge (RFC 9110 §11.3): a scheme and its parameters, without those that are absent. */
function challenge(scheme: string, parameters: Record<string, unknown>): string {
  const present = Object.entries(parameters).filter(([, value]) => value !== undefined);
  return `${scheme} ${present.map(([name, value]) => `${name}="${value}"`).join(", ")}`;
}

// --- Start ---------------------------------------------------------------------------------------

/**
 * Starts the API, also while the issuer is down. Rejects with an Error for a mistake in the
 * settings. A `resource` with port 0 takes a free port.
 */
export async function start(settings = config.resourceServer) {
  config.parseServerUrl("ISSUER", settings.issuer, "other");
  const ownUrl = config.parseServerUrl("API_URL", settings.resource, "own");
  const http = Bun.serve({
    ...(await config.listenOptions("API", ownUrl, settings)),
    development: false,
    maxRequestBodySize: settings.maxBodyBytes,
    fetch: (request, listener) => api.lifecycle.answer(route, request, listener),
  });
  // Only now the port is known. No request arrives before the lines below have run.
  const url = config.urlOf(settings.resource, http);
  const api = new ResourceServer({ ...settings, resource: url });
  const route = config.router(url, routes(api));
  const stop = async () => {
    await api.lifecycle.stop(http, settings.drainSeconds);
    api.issuerKeys.close();
  };
  return { url, server: http, stop };
}

if (import.meta.main) await config.runProgram("API", start);
