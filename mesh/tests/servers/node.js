// What readers in Node make of a path: `name=route` for each, and the port on the first line.
const http = require('node:http')
const path = require('node:path')
const url = require('node:url')

function route(text) {
  if (text === '/admin' || text.startsWith('/admin/')) return 'A'
  if (/^\/v1\/[^/]*:delete\/?$/.test(text)) return 'D'
  if (/^\/metrics\/?$/.test(text)) return 'E'
  if (/^\/api\/v1\/[^/]*\/?$/.test(text)) return 'P'
  return '-'
}

// A reader that throws answers 400, or ends the request: no route.
function read(reader) {
  try {
    return route(reader() ?? '')
  } catch {
    return '-'
  }
}

const server = http.createServer((request, response) => {
  const sent = request.url.split('?')[0]
  const whatwg = () => new URL(request.url, 'http://host').pathname
  const legacy = () => url.parse(request.url).pathname
  const readers = {
    sent: () => sent,
    decoded: () => decodeURIComponent(sent),
    normal: () => path.posix.normalize(decodeURIComponent(sent)),
    windows: () => path.win32.normalize(decodeURIComponent(sent)).replaceAll('\\', '/'),
    // As a router that splits first and then decodes what stands between slashes.
    segments: () => {
      const parts = sent.split('/').map(decodeURIComponent)
      if (parts.length === 3 && parts[1] === 'v1' && parts[2].endsWith(':delete')) return '/v1/x:delete'
      return parts.map((part) => part.replaceAll('/', '%2F')).join('/')
    },
    whatwg,
    whatwgDecoded: () => decodeURIComponent(whatwg()),
    legacy,
    legacyDecoded: () => decodeURI(legacy()),
  }
  response.end(Object.entries(readers).map(([name, reader]) => `${name}=${read(reader)}`).join(' '))
})
server.listen(0, '127.0.0.1', () => console.log(server.address().port))
