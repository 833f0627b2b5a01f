/**
 * The floors that the bench compares with: servers that do the least that such a server must.
 *
 *   bun test/floors.ts a PORT   answers "hi", no more
 *   bun test/floors.ts b PORT   reads the POST, signs a fixed claims set with jose, answers that
 *   bun test/floors.ts c PORT   verifies the presented token with jose (the public JWK is in KEY),
 *                               answers "ok"
 */

type Handler = (request: Request) => Response | Promise<Response>;

const [, , floor, port] = process.argv;

/** jose is loaded by the floors that use it alone: (a) is also the floor of the start-up. */
async function handler(): Promise<Handler> {
  if (floor === "a") return () => new Response("hi");
  const jose = await import("jose");
  if (floor === "b") {
    const { privateKey, publicKey } = await jose.generateKeyPair("ES256");
    const kid = await jose.calculateJwkThumbprint(publicKey);
    const header = { alg: "ES256", kid, typ: "at+jwt" };
    const iat = Math.floor(Date.now() / 1000);
    const times = { iat, nbf: iat, exp: iat + 3600, jti: crypto.randomUUID() };
    const parties = { iss: "http://127.0.0.1:5001", aud: "http://127.0.0.1:6001", sub: "client" };
    const claims = { ...parties, client_id: "client", scope: "api1", ...times };
    return async (request) => {
      await request.text();
      const jwt = new jose.SignJWT(claims).setProtectedHeader(header);
      return new Response(await jwt.sign(privateKey));
    };
  }
  const key = await jose.importJWK(JSON.parse(process.env["KEY"] ?? ""), "ES256");
  return async (request) => {
    const accessToken = request.headers.get("authorization")?.slice("Bearer ".length) ?? "";
    await jose.jwtVerify(accessToken, key);
    return new Response("ok");
  };
}

const fetch = await handler();
Bun.serve({ hostname: "127.0.0.1", port: Number(port), development: false, fetch });
console.error(`floor (${floor})`);
