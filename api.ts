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

/** RFC 6750 §3.1, RFC 9449 §7.1: each code with its status and a constant text. */
const errors = {
  no_credentials: [401, "An access token is needed."], // a code for the log alone (§3.1)
  invalid_request: [400, "The Authorization field is malformed."],
  invalid_token: [401, "The access token is not valid here. The log of the API has the reason."],
  invalid_dpop_proof: [401, "The DPoP proof is missing or not valid."],
  insufficient_scope: [403, "The access token lacks the scope."],
  malformed_body: [400, "The body is not valid JSON."],
  temporarily_unavailable: [503, "The token cannot be checked now. Try again soon."],
} as const;

type ErrorCode = keyof typeof errors;

/** Why a caller is turned away. */
class CallRefusal extends config.Refusal<ErrorCode> {}

function check(holds: unknown, code: ErrorCode, reason: string, details = {}): asserts holds {
  if (!holds) throw new CallRefusal(code, reason, details);
}

/** For what jose throws about a thing: makes it a refusal with this code. */
const refuseAs = (code: ErrorCode, thing: string) => (error: unknown) => {
  const reason = config.reasonOf(error);
  if (error instanceof config.KeysUnavailable)
    throw new CallRefusal("temporarily_unavailable", reason);
  throw new CallRefusal(code, `${thing} is not valid: ${reason}.`);
};

// --- Routes --------------------------------------------------------------------------------------

/** What the API answers; an API of your own adds its lines here, such as "POST /orders". */
const routes = (api: ResourceServer): Record<string, config.Handler> => ({
  "GET /identity": async (request) => {
    const claims = await api.authorize(request, api.settings.scope);
    return jsonAnswer(identityText(claims));
  },
  "GET /health": () => api.health(),
});

/** The JSON body of a request, for a POST. Rejects with a refusal, status 400, if it is malformed. */
export async function jsonBody(request: Request): Promise<unknown> {
  return await request.json().catch(refuseAs("malformed_body", "The body"));
}

function jsonAnswer(text: string, status = 200): Response {
  const headers = { "cache-control": "no-store", "content-type": "application/json" };
  return new Response(text, { status, headers });
}

// Making the text takes a tenth of a call with a remembered token, and claims never change.
const identityTexts = new WeakMap<Claims, string>();

/** The claims as a list of types and values, each value a string; a list gives an entry a member. */
function identityText(claims: Claims): string {
  const known = identityTexts.get(claims);
  if (known !== undefined) return known;
  const asText = (value: unknown) => (typeof value === "string" ? value : JSON.stringify(value));
  const entries = Object.entries(claims).flatMap(([type, value]) =>
    [value].flat().map((member) => ({ type, value: asText(member) })),
  );
  const text = JSON.stringify(entries);
  identityTexts.set(claims, text);
  return text;
}

// --- Authorization -------------------------------------------------------------------------------

class ResourceServer {
  readonly settings: Settings;
  readonly log: config.Log;
  readonly lifecycle: config.Lifecycle;
  readonly issuerKeys: IssuerKeys;
  /** Claims by the Authorization field they came in, with the keys they were verified with. */
  readonly #remembered = new Map<string, { claims: Claims; keys: jose.JWK[] }>();
  readonly #usedProofs = new UsedProofs();

  constructor(settings: Settings) {
    this.settings = settings;
    this.log = new config.Log(settings.log);
    this.lifecycle = new config.Lifecycle(this.log);
    this.issuerKeys = new IssuerKeys(settings, this.log);
  }

  /**
   * Resolves with the claims of a caller who may use `scope`. Rejects with a refusal for any other
   * (RFC 6750 §3).
   */
  async authorize(request: Request, scope: string): Promise<Claims> {
    const authorization = request.headers.get("authorization") ?? "";
    const claims = this.#recall(authorization) ?? (await this.#acceptToken(authorization));
    // A proof is for one request, so it is verified also with a remembered token.
    const proof = claims.cnf ? await verifyProof(this.settings, request, claims) : undefined;
    const { client_id, jti, scope: granted } = claims;
    const reason = `The API wants scope ${scope}, the token has ${JSON.stringify(granted)}.`;
    check(hasScope(granted, scope), "insufficient_scope", reason, { scope, client_id, jti });
    // Only now: who may not use the API must not fill the memory of those who may.
    if (proof) this.#usedProofs.use(client_id, proof);
    return claims;
  }

  /** The claims of a token that was accepted before. */
  #recall(authorization: string): Claims | undefined {
    const known = this.#remembered.get(authorization);
    if (known?.keys !== this.issuerKeys.keys || !this.issuerKeys.areKnown) return undefined;
    // Without leeway: a token that is about to expire is validated again.
    return known.claims.exp > config.secondsAt(this.settings.clock) ? known.claims : undefined;
  }

  /** Validates the token of an Authorization field, and remembers it. */
  async #acceptToken(authorization: string): Promise<Claims> {
    const presented = presentedToken(authorization);
    check(presented.kind !== "absent", "no_credentials", "The request has no access token.");
    const malformed = "The Authorization field has no well-formed access token.";
    check(presented.kind === "token", "invalid_request", malformed);
    // If the keys change while the token is verified, the memory of it will not count.
    const { keys } = this.issuerKeys;
    const claims = await this.#validateToken(presented.accessToken);
    const scheme = claims.cnf ? "dpop" : "bearer";
    const reason = `The token must be sent with scheme ${scheme}, not ${presented.scheme}.`;
    check(presented.scheme === scheme, "invalid_token", reason, { client_id: claims.client_id });
    if (authorization.length > 4_096) return claims;
    this.#remembered.set(authorization, { claims, keys });
    const [oldest = ""] = this.#remembered.keys();
    if (this.#remembered.size > 1_000) this.#remembered.delete(oldest);
    return claims;
  }

  /** RFC 9068 §4. Rejects with invalid_token for a token that is not valid here. */
  async #validateToken(accessToken: string): Promise<Claims> {
    const verifying = jose.jwtVerify<Claims>(accessToken, this.issuerKeys.find, {
      typ: "at+jwt", // or application/at+jwt
      algorithms: this.settings.acceptedAlgorithms,
      issuer: this.settings.issuer,
      audience: this.settings.resource,
      requiredClaims: ["exp", "iat"],
      clockTolerance: config.leewaySeconds,
      currentDate: new Date(this.settings.clock()),
    });
    const { payload, protectedHeader } = await verifying.catch(
      refuseAs("invalid_token", "The access token"),
    );
    // RFC 7515 §4.1.11: no extension is known here. jose would accept b64.
    check(!protectedHeader.crit, "invalid_token", "The token has a crit header.");
    check(protectedHeader.kid, "invalid_token", "The token names no kid.");
    for (const claim of ["sub", "client_id", "jti"])
      check(config.isText(payload[claim]), "invalid_token", `The token has no text as ${claim}.`);
    // RFC 7800 §3 has several ways to bind a token; this server knows one.
    const isKnown = !("cnf" in payload) || config.isText(payload.cnf?.jkt);
    check(isKnown, "invalid_token", "The token is bound in another way than by jkt.");
    return deepFreeze(payload);
  }

  /** Whether this instance should get calls. One without keys looks for them. */
  health(): Response {
    if (!this.issuerKeys.areKnown) this.issuerKeys.refreshInBackground();
    const isReady = this.issuerKeys.areKnown && !this.lifecycle.isStopping;
    return jsonAnswer(`{"status":"${isReady ? "ok" : "unavailable"}"}`, isReady ? 200 : 503);
  }
}

type PresentedToken =
  { kind: "absent" | "malformed" } | { kind: "token"; scheme: string; accessToken: string };

/** RFC 6750 §2.1, RFC 9449 §7.1: the scheme in lower case, for its case does not count. */
function presentedToken(authorization: string): PresentedToken {
  const [, scheme, accessToken] = /^(Bearer|DPoP) +([\w.~+/-]+=*)$/i.exec(authorization) ?? [];
  if (scheme && accessToken) return { kind: "token", scheme: scheme.toLowerCase(), accessToken };
  // Two fields arrive as one, joined by a comma, so the scheme need not stand at the start.
  const isOurs = /(^|, *)(Bearer|DPoP)( |$)/i.test(authorization);
  return { kind: isOurs ? "malformed" : "absent" };
}

/** Other issuers send a list where RFC 9068 §2.2.3 has a string. */
function hasScope(granted: unknown, scope: string): boolean {
  return (config.isText(granted) ? granted.split(" ") : [granted].flat()).includes(scope);
}

/** A remembered token is used for many calls: what a handler writes must not reach the next one. */
function deepFreeze<T>(value: T): T {
  if (typeof value !== "object" || value === null) return value;
  Object.values(value).forEach(deepFreeze);
  return Object.freeze(value);
}

// --- Proof of possession -------------------------------------------------------------------------

/**
 * RFC 9449 §4.3 and §7.1. Resolves with the identifier of the proof, which may be used once. Rejects
 * with invalid_dpop_proof for a proof that does not fit this request and its token.
 */
async function verifyProof(settings: Settings, request: Request, claims: Claims): Promise<string> {
  const { client_id, cnf } = claims;
  const refuseUnless = (holds: unknown, reason: string) =>
    check(holds, "invalid_dpop_proof", reason, { client_id });
  const verifying = jose.jwtVerify(request.headers.get("dpop") ?? "", jose.EmbeddedJWK, {
    typ: "dpop+jwt",
    algorithms: settings.acceptedAlgorithms,
    maxTokenAge: config.proofMaxAgeSeconds - config.leewaySeconds, // jose adds the leeway to it
    clockTolerance: config.leewaySeconds,
    currentDate: new Date(settings.clock()),
  });
  const { payload, protectedHeader } = await verifying.catch(
    refuseAs("invalid_dpop_proof", "The DPoP proof"),
  );
  const { crit, jwk = {} } = protectedHeader;
  const { htm, htu, jti, ath } = payload;
  refuseUnless(!crit, "The DPoP proof has a crit header.");
  // §4.3 (7). jose lets an RSA key with p and q pass.
  const isPublic = !config.privateMembers.some((member) => member in jwk);
  refuseUnless(isPublic, "The DPoP proof shows a private key.");
  // §4.3 (9): without query and fragment, normalized by `new URL`. Our side is the configured URL,
  // never Host or X-Forwarded-*, which anybody can write.
  const { href } = new URL(config.pathOf(request, settings.resource) ?? "", settings.resource);
  const [target] = URL.parse(config.isText(htu) ? htu : "")?.href.split(/[?#]/) ?? [];
  const reason = `The DPoP proof is for ${JSON.stringify([htm, htu])}, this is ${request.method} ${href}.`;
  refuseUnless(htm === request.method && target === href, reason);
  const [, accessToken = ""] = (request.headers.get("authorization") ?? "").split(/ +/);
  const hash = config.sha256(accessToken, "base64url");
  refuseUnless(ath === hash, "The ath of the DPoP proof is of another token.");
  const jkt = await jose.calculateJwkThumbprint(jwk as jose.JWK);
  refuseUnless(jkt === cnf?.jkt, "The DPoP proof is by another key than the token is bound to.");
  refuseUnless(config.isText(jti), "The DPoP proof has no jti.");
  return config.sha256(JSON.stringify([jkt, href, jti]), "base64url");
}

/** The proofs that were used, so that none is used twice (RFC 9449 §11.1). */
class UsedProofs {
  readonly #byClient = new Map<string, Set<string>>();
  #count = 0;

  /** Throws a refusal if the proof was used before. */
  use(client_id: string, proof: string): void {
    const proofs = this.#byClient.get(client_id) ?? new Set();
    const isNew = !proofs.has(proof);
    check(isNew, "invalid_dpop_proof", "The DPoP proof was used before.", { client_id });
    this.#byClient.set(client_id, proofs.add(proof));
    this.#count++;
    if (this.#count > 50_000) this.#forgetOne();
  }

  /**
   * Choice: the client with the most proofs loses its oldest. So one that floods forgets its own,
   * never another's, and nobody is refused because the memory is full.
   */
  #forgetOne(): void {
    let most = new Set<string>();
    for (const proofs of this.#byClient.values()) if (proofs.size > most.size) most = proofs;
    const [oldest = ""] = most;
    most.delete(oldest);
    this.#count--;
  }
}

// --- Keys of the issuer --------------------------------------------------------------------------

/** The issuer's public keys, found through its metadata and refreshed in the background. */
class IssuerKeys extends config.RemoteKeys {
  readonly #log: config.Log;
  readonly #timer: Timer;

  constructor(settings: Settings, log: config.Log) {
    const { coolDownSeconds, keepKeysSeconds: keepSeconds, refreshSeconds, clock } = settings;
    // No call waits for newer keys, as long as there are any: the timer fetches them.
    const rules = { coolDownSeconds, keepSeconds, maxAgeSeconds: keepSeconds };
    super(async (signal) => await fetchIssuerKeys(settings, signal), rules, clock);
    this.#log = log;
    const refresh = () => this.areKnown && this.refreshInBackground();
    this.#timer = setInterval(refresh, refreshSeconds * 1000).unref();
  }

  refreshInBackground(): void {
    const logFailure = (error: unknown) =>
      this.#log.write("keys not fetched", { reason: config.reasonOf(error) });
    this.refresh().catch(logFailure);
  }

  close(): void {
    clearInterval(this.#timer);
  }
}

async function fetchIssuerKeys({ issuer, tls }: Settings, signal: AbortSignal): Promise<unknown> {
  const metadata = await config.fetchJson(config.metadataUrl(issuer), signal, tls);
  // RFC 8414 §3.3: the issuer in the metadata MUST be identical to the one that was asked.
  const named = metadata["issuer"];
  if (named !== issuer) throw new Error(`The metadata is of issuer ${named}, not ${issuer}.`);
  const { keys } = await config.fetchJson(String(metadata["jwks_uri"]), signal, tls);
  return keys;
}

// --- Metadata and challenges ---------------------------------------------------------------------

const metadataUrlOf = (resource: string) =>
  config.wellKnownUrl(resource, "oauth-protected-resource");

/** RFC 9728 §2. */
function metadata({
  resource,
  resource_name,
  issuer,
  scope,
  acceptedAlgorithms,
}: Settings): string {
  return JSON.stringify({
    resource,
    resource_name,
    authorization_servers: [issuer],
    scopes_supported: [scope],
    bearer_methods_supported: ["header"],
    dpop_signing_alg_values_supported: acceptedAlgorithms,
  });
}

/** A challenge of RFC 9110 §11.6.1: a scheme and its parameters. */
function challenge(scheme: string, parameters: Record<string, unknown>): string {
  const list = Object.entries(parameters).map(([name, value]) => `${name}="${value}"`);
  return `${scheme} ${list.join(", ")}`;
}

/** RFC 6750 §3, RFC 9449 §7.1, RFC 9728 §5.1; the error stands at the scheme that was used. */
function challenges(settings: Settings, { code, details }: CallRefusal, usesDpop: boolean): string {
  const error = { error: code, error_description: errors[code][1] };
  const scope = code === "insufficient_scope" ? { scope: details["scope"] } : {};
  // RFC 6750 §3.1: no error where no credentials came.
  const why = code === "no_credentials" ? {} : { ...error, ...scope };
  const where = { resource_metadata: metadataUrlOf(settings.resource) };
  const algs = settings.acceptedAlgorithms.join(" ");
  const bearer = challenge("Bearer", { ...(usesDpop ? {} : why), ...where });
  return `${bearer}, ${challenge("DPoP", { ...(usesDpop ? why : {}), algs, ...where })}`;
}

/** The answer for a caller who is turned away. */
function refusalAnswer(settings: Settings, request: Request, refusal: CallRefusal): Response {
  const [status, text] = errors[refusal.code];
  const headers = new Headers({ "cache-control": "no-store" });
  const usesDpop = /^dpop/i.test(request.headers.get("authorization") ?? "");
  if (status === 503) headers.set("retry-after", String(settings.coolDownSeconds));
  else if (refusal.code !== "malformed_body")
    headers.set("www-authenticate", challenges(settings, refusal, usesDpop));
  return new Response(text, { status, headers });
}

// --- Start ---------------------------------------------------------------------------------------

/** Logs each call that is refused, and makes the refusal an answer. */
function refusing(api: ResourceServer, handler: config.Handler): config.Handler {
  return async (request, server) => {
    const started = performance.now();
    try {
      return await handler(request, server);
    } catch (error) {
      if (!(error instanceof CallRefusal)) throw error;
      const address = server.requestIP(request)?.address;
      const milliseconds = Math.round(performance.now() - started);
      const { code, message: reason, details } = error;
      api.log.write("call refused", { address, ...details, error: code, reason, milliseconds });
      return refusalAnswer(api.settings, request, error);
    }
  };
}

/** All handlers by method and path, below the path of the resource. */
function handlers(api: ResourceServer): Map<string, config.Handler> {
  const { origin, pathname } = new URL(api.settings.resource);
  const base = pathname === "/" ? "" : pathname;
  const own = Object.entries(routes(api)).map(
    ([route, handler]) => [route.replace(" ", ` ${base}`), handler] as const,
  );
  const metadataPath = metadataUrlOf(api.settings.resource).slice(origin.length);
  return new Map(own).set(`GET ${metadataPath}`, () => jsonAnswer(metadata(api.settings)));
}

/**
 * Starts the API, also while the issuer is down. Rejects with an Error for a mistake in the
 * settings. A `resource` with port 0 takes a free port.
 */
export async function start(settings = config.resourceServer): Promise<config.RunningServer> {
  config.parseServerUrl("ISSUER", settings.issuer);
  const ownUrl = config.parseOwnUrl("API_URL", settings.resource);
  const server = Bun.serve({
    ...config.listenOptions("API", ownUrl, settings),
    development: false,
    maxRequestBodySize: settings.maxBodyBytes,
    fetch: (request, http) => api.lifecycle.answer(answer, request, http),
  });
  const url = config.urlOf(settings.resource, server);
  const api = new ResourceServer({ ...settings, resource: url });
  const answer = refusing(api, config.router(url, handlers(api)));
  const stop = async () => {
    await api.lifecycle.stop(server, settings.drainSeconds);
    api.issuerKeys.close();
  };
  return { url, server, stop };
}

if (import.meta.main) {
  config.requireBunVersion();
  const running = await start().catch(config.fail);
  config.stopOnSignal(running);
  console.error(`API: ${running.url}`);
}
