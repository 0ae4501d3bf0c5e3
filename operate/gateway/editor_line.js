// What the editor has no place for: why a job waits while the fleet wakes. One line, and a way to the page /fleet.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const EVERY_MS = 3000

app.registerExtension({
  name: 'Fleet.Line',
  commands: [{ id: 'Fleet.Open', label: 'Fleet', icon: 'pi pi-server', function: () => window.open('/fleet', '_blank') }],
  menuCommands: [{ path: [], commands: ['Fleet.Open'] }],
  setup() {
    const line = document.createElement('a')
    line.id = 'fleet-line'
    line.href = '/fleet'
    line.target = '_blank'
    line.setAttribute('role', 'status')
    line.style.cssText =
      'position:fixed;left:50%;bottom:1.25rem;transform:translateX(-50%);z-index:900;max-width:80vw;padding:.5rem .9rem;' +
      'border-radius:.5rem;background:#1f4e79;color:#fff;font:14px/1.4 system-ui,sans-serif;text-decoration:none;display:none'
    document.body.append(line)

    let unfinished = 0
    let timer = null
    const show = (text) => {
      line.textContent = text
      line.style.display = text ? 'block' : 'none'
    }
    const look = async () => {
      timer = null
      if (!unfinished) return show('')
      try {
        const language = app.ui.settings.getSettingValue('Comfy.Locale') || navigator.language
        const answer = await api.fetchApi(`/fleet/line?lang=${encodeURIComponent(language)}`)
        if (answer.ok) show(unfinished ? (await answer.json()).line : '')
      } catch {
        show('') // serve is away for a moment; the editor itself says so
      }
      if (unfinished && !timer) timer = setTimeout(look, EVERY_MS)
    }
    api.addEventListener('status', (event) => {
      unfinished = event.detail?.exec_info?.queue_remaining ?? 0
      if (!timer) timer = setTimeout(look, unfinished ? 300 : 0)
    })
  }
})
