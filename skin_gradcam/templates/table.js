// Finds and orders the rows of a report's summary, and the cards that belong to them. Without it the table stands as it came.
document.addEventListener('DOMContentLoaded', () => {
  for (const form of document.querySelectorAll('form.sift')) {
    const table = document.getElementById(form.dataset.for), body = table.tBodies[0], {name, decision, order} = form.elements
    const rows = [...body.rows].map((row, place) => ({row, place, name: row.cells[0].textContent.trim(), decision: row.cells[1].textContent.trim(),
      p: Object.fromEntries([...row.querySelectorAll('.nums')].map(c => [c.dataset.c, +c.textContent])),
      card: document.getElementById(row.querySelector('a')?.hash.slice(1))}))
    const shows = o => o.name.toLowerCase().includes(name.value.trim().toLowerCase()) && (!decision.value || o.decision === decision.value)
    const by = k => (a, b) => (k === 'name' || k === 'decision' ? a[k].localeCompare(b[k], undefined, {numeric: true}) : k ? (b.p[k] ?? -1) - (a.p[k] ?? -1) : 0) || a.place - b.place
    function sift() {
      rows.sort(by(order.value))
      body.append(...rows.map(o => o.row))
      let n = 0
      for (const o of rows) { const on = shows(o); n += on; o.row.hidden = !on; if (o.card) o.card.hidden = !on }
      form.querySelector('output').value = `${n} of ${rows.length} shown`
      for (const th of table.tHead.rows[0].cells) {
        if (th.dataset.key && th.dataset.key === order.value) th.ariaSort = th.dataset.key.length > 3 ? 'ascending' : 'descending'
        else th.removeAttribute('aria-sort')
      }
    }
    form.addEventListener('input', sift)
    form.addEventListener('submit', e => e.preventDefault())
    form.hidden = false
    sift()
  }
})
